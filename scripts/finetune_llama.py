"""Fine-tune a LLaMA, or any causal language model of transformers, with DoRA, LoRA, PEFT's DoRA, or in full.

    python scripts/finetune_llama.py CONFIG.yaml [--option value ...]
    accelerate launch --config_file configs/accelerate/ddp.yaml scripts/finetune_llama.py configs/llama3_8b_r16.yaml

`configs/` holds the settings. Options are those of the model with its adapter, of the data, and all of transformers'
TrainingArguments, by the same names in YAML and on the command line, which wins: `--optim`, `--torch_compile`,
`--deepspeed`, `--report_to`. `--load_in_4bit` makes it QDoRA. On a laptop without GPU, with the model and the data of
`scripts/prepare_smollm2.py` and `scripts/prepare_cmudict.py`:

    python scripts/finetune_llama.py configs/smollm2_135m.yaml --method dora --max_steps 60

Expected result: one training sequence as the model sees it, a falling loss, and in `output_dir` the adapter with its
tokenizer, `loss.png`, `eval_results.json`, `trainer_state.json` with every logged loss, and with `--merge` the folder
`merged`. A run that was killed goes on from its last checkpoint with `--resume_from_checkpoint true`, and its losses
are those of a run that was not; a folder that holds another run's output is refused. What is wrong with options, data
or model is said in one line, with status 2 if it shows before anything is loaded and 1 later, where `--log_level debug`
shows a traceback. What shows only within a step of training, such as `--gradient_checkpointing_kwargs` that torch does
not know, ends in a traceback.
"""

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import upload_folder
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from common.errors import OptionError, plain_errors
from common.files import write_json
from finetune.arguments import DataArguments, ModelArguments
from finetune.checkpoints import (
    SETTINGS,
    check_output_dir,
    check_same_run,
    find_checkpoint,
    kind_of,
    staged,
    whole_checkpoints,
)
from finetune.checks import check_four_bit, check_options, prepare_repository
from finetune.data import AnswerCollator, load_datasets
from finetune.model import build_model, count_parameters, load_tokenizer
from finetune.options import build_parser
from finetune.sample import show_sample
from finetune.trainer import AnswerTrainer, leave_process_group

# What may change when a run goes on from a checkpoint.
FREE_TO_CHANGE = ("lr_magnitude", "merge", "eval_dataset", "eval_split", "max_eval_samples")
# Of what a run leaves: local paths, and what the adapter makes again.
NOT_UPLOADED = ["checkpoint-*/*", "merged/*", "training_args.bin", SETTINGS]


def draw_loss(log_history: Sequence[dict[str, Any]], title: str) -> bytes:
    """The training and evaluation losses over the optimizer steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o--")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=4)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss per answer token")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def settings_of(model: ModelArguments, data: DataArguments) -> dict[str, Any]:
    """What a run has to share with an earlier one to go on with it."""
    values = dataclasses.asdict(model) | dataclasses.asdict(data) | {"weights": kind_of(model.method)}
    return {name: value for name, value in values.items() if name not in FREE_TO_CHANGE}


def optimizer_of(args: TrainingArguments) -> str:
    """The optimizers whose states are alike have one name."""
    return args.optim.value.removesuffix("_fused")


def build_trainer(
    model: ModelArguments,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
) -> AnswerTrainer:
    """The trainer of a new model, which it describes in a line."""
    set_seed(args.seed)
    adapted = build_model(model, tokenizer)
    num_trainable, num_all = count_parameters(adapted)
    if args.process_index == 0:
        print(
            f"{model.method}: {num_trainable:,} of {num_all:,} parameters are trained ({num_trainable / num_all:.2%})"
        )
    trainer = AnswerTrainer(
        model=adapted,
        args=args,
        data_collator=AnswerCollator(tokenizer.pad_token_id),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        lr_magnitude=model.lr_magnitude if model.method == "dora" else None,
    )
    if args.dataloader_drop_last and not len(trainer.get_train_dataloader()):
        raise ValueError(
            f"dataloader_drop_last: leaves nothing of {len(train_dataset)} sequences, fewer than a batch of "
            f"{args.train_batch_size} on each of {args.world_size} processes. Leave it out, or use smaller batches."
        )
    if model.load_in_4bit and eval_dataset is not None:
        check_four_bit(adapted)
    if args.deepspeed and not trainer.is_deepspeed_enabled:
        raise ValueError(
            "deepspeed: accelerate does not take it up, such as with ACCELERATE_USE_CPU; see its settings."
        )
    if model.merge and trainer.is_fsdp_enabled:
        raise ValueError("merge: not possible on weights sharded by FSDP; merge the saved adapter in one process.")
    return trainer


def train(trainer: AnswerTrainer, checkpoint: Path | None) -> dict[str, float]:
    """Train, evaluate and save the adapter or the model; on every process.

    Returns:
        Losses and number of steps.
    """
    output_dir, is_main = Path(trainer.args.output_dir), trainer.args.process_index == 0
    with whole_checkpoints(output_dir) if is_main else contextlib.nullcontext():
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Trainer turned the cache off for training; a saved model should generate with it.
    trainer.model.config.use_cache = True
    with staged(output_dir) if is_main else contextlib.nullcontext(output_dir) as folder:
        trainer.save_model(str(folder))
    trainer.model.config.use_cache = False
    history, last_step = trainer.state.log_history, trainer.state.global_step
    metrics = next((entry for entry in history if "eval_loss" in entry and entry["step"] == last_step), {})
    if trainer.eval_dataset is not None and (not metrics or trainer.args.load_best_model_at_end):
        metrics = trainer.evaluate()
    return metrics | {"train_loss": result.training_loss, "step": last_step}


def save_results(trainer: AnswerTrainer, method: str, metrics: dict[str, float]) -> None:
    """Write the logged losses, their plot and the metrics beside the adapter."""
    output_dir = Path(trainer.args.output_dir)
    with staged(output_dir) as folder:
        folder.mkdir()
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / "loss.png").write_bytes(draw_loss(trainer.state.log_history, f"{method}, {output_dir.name}"))
        (folder / "eval_results.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print("  ".join(f"{name} {metrics[name]:.4f}" for name in ("train_loss", "eval_loss") if name in metrics))
    print(f"saved to {output_dir}")


def save_merged(trainer: AnswerTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Merge the adapter into the model and save both as one."""
    target = Path(trainer.args.output_dir) / "merged"
    with staged(target) as folder:
        merged = trainer.model.merge_and_unload()
        merged.config.use_cache = True
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"merged model saved to {target}")


def run(
    model: ModelArguments, data: DataArguments, args: TrainingArguments, checkpoint: Path | None, repository: str | None
) -> None:
    """One run with options that were checked."""
    is_main, shows_traceback = args.process_index == 0, args.log_level == "debug"
    with plain_errors(ValueError, OSError, ImportError, traceback=shows_traceback):
        tokenizer = load_tokenizer(model)
        with args.main_process_first(desc="tokenizing"):
            train_dataset, eval_dataset = load_datasets(data, tokenizer, args.seed)
        if is_main:
            print(f"{len(train_dataset)} sequences to train on, {len(eval_dataset or [])} to evaluate on")
            print(show_sample(train_dataset[0], tokenizer, coloured=sys.stdout.isatty()), flush=True)
        trainer = build_trainer(model, args, tokenizer, train_dataset, eval_dataset)
        if is_main:
            write_json(Path(args.output_dir) / SETTINGS, settings_of(model, data) | {"optim": optimizer_of(args)})
    # From here on a full disk and what shows as Trainer prepares are the user's to mend.
    with plain_errors(OSError, OptionError, traceback=shows_traceback):
        metrics = train(trainer, checkpoint)
        leave_process_group(trainer)
        if not is_main:
            return
        save_results(trainer, model.method, metrics)
        if model.merge and model.method != "full":
            save_merged(trainer, tokenizer)
    if repository is not None:
        upload_folder(
            repo_id=repository,
            folder_path=args.output_dir,
            ignore_patterns=NOT_UPLOADED,
            token=args.hub_token,
            revision=args.hub_revision,
        )
        print(f"pushed to {repository}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    model, data, args, _ = parser.parse(argv)
    output_dir, repository = Path(args.output_dir), None
    try:
        check_options(model, data, args)
        checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
        if checkpoint is not None:
            check_same_run(checkpoint, output_dir, model.method, optimizer_of(args), settings_of(model, data))
        if args.process_index == 0:
            check_output_dir(output_dir, settings_of(model, data), args.resume_from_checkpoint)
            for name in model.unused_options():
                print(f"note: {name} has no meaning for method {model.method} and is not used")
            if args.push_to_hub:
                repository = prepare_repository(args)
            if checkpoint is not None:
                print(f"continuing from {checkpoint}")
    except ValueError as error:
        parser.error(str(error))
    # The whole folder goes to the Hub at the end; Trainer would push what it saves, local paths included.
    args.push_to_hub = False
    run(model, data, args, checkpoint, repository)


if __name__ == "__main__":
    main()
