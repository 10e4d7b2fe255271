"""What can go wrong in a fine-tune run and shows before a model is loaded: packages, trackers, the Hub, precision."""

import importlib.util
import warnings
from pathlib import Path

import torch
from huggingface_hub import create_repo, get_token
from torch import nn
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from common.errors import one_line
from finetune.arguments import DataArguments, ModelArguments

# What an evaluation gives, without the prefix eval_.
METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")
# of a 4-bit weight, which bitsandbytes 0.50 repacks together
PACKED_ROWS = 32


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
    if args.push_to_hub and args.hub_strategy != "end":
        raise ValueError(
            f"hub_strategy: expected end, for checkpoints are not uploaded, found {args.hub_strategy.value}."
        )
    check_evaluation(args)
    check_schedule(args)
    check_trackers(args)


def check_evaluation(args: TrainingArguments) -> None:
    """Raise a ValueError for what would keep the evaluation from giving its one loss, or asks it for more."""
    if args.batch_eval_metrics or not args.eval_do_concat_batches:
        raise ValueError(
            "batch_eval_metrics and eval_do_concat_batches are fixed here: eval_loss is the mean over all answer "
            "tokens, which no batch knows. Leave them out."
        )
    if args.label_names not in (None, ["labels"]):
        raise ValueError(f"label_names: records have the one name labels here, found {args.label_names}. Leave it out.")
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in METRICS:
        raise ValueError(f"metric_for_best_model: expected one of {', '.join(METRICS)}, found {metric!r}.")


def check_schedule(args: TrainingArguments) -> None:
    """Raise a ValueError for a schedule of the learning rate that lacks what it needs, or has what it does not know."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    # The run's own number is not known yet, and no schedule is impossible in so many.
    steps = args.max_steps if args.max_steps > 0 else 10**6
    kwargs = args.lr_scheduler_kwargs
    try:
        with warnings.catch_warnings():
            # Trainer makes it again, which says the same.
            warnings.simplefilter("ignore")
            get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, kwargs)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"lr_scheduler_type {args.lr_scheduler_type.value} with lr_scheduler_kwargs {kwargs}: {one_line(error)}."
        ) from error


def check_four_bit(model: nn.Module) -> None:
    """Raise a ValueError for 4-bit layers that bitsandbytes cannot evaluate here: it repacks weights for some CPUs."""
    from bitsandbytes.nn import Linear4bit

    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit) or layer.weight.device.type != "cpu":
            continue
        rows, columns = PACKED_ROWS, layer.weight.blocksize
        # releases that repack nothing have no such attribute
        repacks = getattr(layer, "support_avx512bf16_for_cpu", False)
        if repacks and (layer.out_features % rows or layer.in_features % columns):
            raise ValueError(
                f"load_in_4bit: on this processor bitsandbytes cannot evaluate {name}, for its weight of "
                f"{layer.out_features} x {layer.in_features} is not of whole blocks of {rows} x {columns}. Leave the "
                "evaluation data out."
            )


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
