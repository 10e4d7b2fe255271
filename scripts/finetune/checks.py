"""What can go wrong in a fine-tune run and shows before a model is loaded: packages, trackers, the Hub, precision."""

import importlib.util
from pathlib import Path

from huggingface_hub import create_repo, get_token
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from common.errors import one_line
from finetune.arguments import DataArguments, ModelArguments


def check_options(model: ModelArguments, data: DataArguments, args: TrainingArguments) -> None:
    """Check what the three groups of options ask of each other, of the device and of installed packages.

    Raises:
        ValueError: naming the option and what to do.
    """
    has_evaluation = data.eval_dataset is not None or data.eval_size > 0
    if args.eval_strategy != "no" and not has_evaluation:
        raise ValueError("eval_steps and eval_strategy need evaluation data: give eval_dataset or eval_size.")
    if args.deepspeed and args.use_cpu:
        raise ValueError("deepspeed and use_cpu exclude each other: Trainer would leave DeepSpeed out.")
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 needs a GPU, for its loss scaling does not run on a CPU: use bf16, or neither.")
    if model.dtype == "float16" and args.bf16:
        raise ValueError("dtype float16 and bf16 exclude each other: use dtype bfloat16 or float32 with bf16.")
    if model.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes.")
    if args.batch_eval_metrics or not args.eval_do_concat_batches:
        raise ValueError(
            "batch_eval_metrics and eval_do_concat_batches are fixed here: eval_loss is the mean over all answer "
            "tokens, which no batch knows. Leave them out."
        )
    if args.push_to_hub and args.hub_strategy != "end":
        raise ValueError(
            f"hub_strategy: expected end, for checkpoints are not uploaded, found {args.hub_strategy.value}."
        )
    check_trackers(args)


def check_trackers(args: TrainingArguments) -> None:
    """Raise a ValueError for a tracker that is unknown or whose package is not installed."""
    for name in args.report_to:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise ValueError(f"report_to: {one_line(error)}") from error
        try:
            # The callbacks ask for their packages as they are made, and start nothing before training.
            callback()
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"report_to: {one_line(error)} Or choose --report_to none.") from error


def prepare_repository(args: TrainingArguments) -> str:
    """Create the repository to push to, now rather than after hours of training, and return its name.

    Raises:
        ValueError: there is no token, or the Hub refuses the token or the name.
    """
    if args.hub_token is None and get_token() is None:
        raise ValueError("push_to_hub: no token of the Hub; run `hf auth login`, or set HF_TOKEN.")
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:
        # The client raises a class of its own for each reason, and its HTTP library's if it reaches nobody.
        raise ValueError(f"push_to_hub: cannot create or reach {name}: {one_line(error)}") from error
