"""Fine-tune a LLaMA, or any causal language model of transformers, with DoRA, LoRA, PEFT's DoRA, or in full.

    python scripts/finetune_llama.py CONFIG.yaml [--field value ...]
    accelerate launch --config_file configs/accelerate/ddp.yaml scripts/finetune_llama.py configs/llama3_8b_r16.yaml

`configs/` holds the settings; `--help` lists the fields, each of which can be overridden on the command line. On a
laptop without GPU, with the model and the data of `scripts/prepare_smollm2.py` and `scripts/prepare_cmudict.py`:

    python scripts/finetune_llama.py configs/smollm2_135m.yaml --method dora --max_steps 60

Expected result: a falling loss, and in `output_dir` the adapter with its tokenizer, `loss.png`, `eval_results.json`,
`trainer_state.json` with every logged loss, and with `--merge` the folder `merged`. A run that was killed goes on from
its last checkpoint with `--resume_from_checkpoint true`, and its losses are those of a run that was not.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import create_repo, upload_folder
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput

from dora_peft import param_groups
from finetune.config import FinetuneConfig, build_parser, parse_config
from finetune.data import IGNORE, AnswerCollator, load_datasets
from finetune.model import build_model, count_parameters, load_tokenizer


class AnswerTrainer(Trainer):
    """Trainer whose optimizer decays matrices only, and whose `eval_loss` is the mean over the answer tokens.

    Args:
        lr_magnitude: learning rate of DoRA's magnitudes; None leaves them at the common one.
    """

    def __init__(self, *args: Any, lr_magnitude: float | None = None, **kwargs: Any) -> None:
        super().__init__(
            *args, preprocess_logits_for_metrics=sum_answer_losses, compute_metrics=mean_answer_loss, **kwargs
        )
        self.lr_magnitude = lr_magnitude

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = param_groups(self.model if model is None else model, self.args.weight_decay, self.lr_magnitude)
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        # Trainer's own figure depends on the batch size, and with several processes on the records that fill up the
        # last batch: 2.6 % off for 6 records in two processes.
        output.metrics["eval_loss"] = output.metrics.pop("eval_answer_loss")
        return output


def sum_answer_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed loss and number of answer tokens of each sequence.

    Args:
        logits: [batch, length, vocabulary].
        labels: [batch, length], -100 where no answer is.

    Returns:
        [batch, 2] float32.
    """
    rows = []
    # Row by row: a float32 copy of all logits would be the largest tensor of the evaluation.
    for row, row_labels in zip(logits, labels[:, 1:], strict=True):
        total = F.cross_entropy(row[:-1].float(), row_labels, ignore_index=IGNORE, reduction="sum")
        rows.append(torch.stack([total, (row_labels != IGNORE).sum().to(total.dtype)]))
    return torch.stack(rows)


def mean_answer_loss(prediction: EvalPrediction) -> dict[str, float]:
    """The mean loss over all answer tokens of an evaluation."""
    total, count = prediction.predictions.sum(axis=0, dtype="float64")
    return {"answer_loss": float(total / count)}


def training_arguments(config: FinetuneConfig) -> TrainingArguments:
    """The configuration in the Trainer's terms."""
    checkpointing: dict[str, Any] = {}
    if config.gradient_checkpointing:
        # transformers renamed the two in the course of version 5 and warns about the older names.
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        kind = "activation" if "activation_checkpointing" in known else "gradient"
        checkpointing = {f"{kind}_checkpointing": True, f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=config.output_dir,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.lr_scheduler_type,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        # Without this, processes started on a machine that has no accelerator would not find each other.
        use_cpu=config.use_cpu or not torch.accelerator.is_available(),
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        eval_strategy="no" if config.eval_steps is None else "steps",
        eval_steps=config.eval_steps,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=config.save_total_limit,
        report_to=config.report_to,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        **checkpointing,
    )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: Trainer writes `trainer_state.json` last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def find_checkpoint(config: FinetuneConfig) -> Path | None:
    """The checkpoint to continue from, or None to start anew.

    Raises:
        ValueError: if the checkpoint asked for is missing or incomplete, or if a new run would mix with an older one's.
    """
    output_dir = Path(config.output_dir)
    if isinstance(config.resume_from_checkpoint, str):
        checkpoint = Path(config.resume_from_checkpoint)
        if not is_whole(checkpoint):
            whole = [str(path) for path in list_checkpoints(output_dir) if is_whole(path)]
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} is no complete checkpoint; {output_dir} holds {whole or 'none'}."
            )
        return checkpoint
    checkpoints = list_checkpoints(output_dir)
    if config.resume_from_checkpoint:
        return next((path for path in reversed(checkpoints) if is_whole(path)), None)
    if checkpoints:
        raise ValueError(
            f"output_dir: {output_dir} holds {checkpoints[-1].name} of an earlier run; continue it with "
            "--resume_from_checkpoint true, choose another --output_dir, or remove it."
        )
    return None


@contextlib.contextmanager
def whole_checkpoints(output_dir: Path) -> Iterator[None]:
    """Remove what a killed run left of its last checkpoint, and what a full disk leaves of one in this run.

    Raises:
        OSError: naming the checkpoint that could not be written.
    """
    remove_incomplete_checkpoints(output_dir)
    try:
        yield
    except Exception as error:
        removed = remove_incomplete_checkpoints(output_dir)
        if not removed:
            raise
        raise OSError(
            f"{removed[-1]}: the checkpoint could not be saved ({error}) and was removed. Free some space and run "
            "again with --resume_from_checkpoint true, which goes on from the checkpoint before."
        ) from error


def remove_incomplete_checkpoints(output_dir: Path) -> list[Path]:
    """Remove the checkpoints in `output_dir` that were not written to their end, and return their paths."""
    incomplete = [path for path in list_checkpoints(output_dir) if not is_whole(path)]
    for path in incomplete:
        shutil.rmtree(path)
    return incomplete


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder to save into, whose files move into `target` once all are written; an error leaves nothing behind."""
    staging = target.with_name(f"{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        yield staging
        target.mkdir(parents=True, exist_ok=True)
        for path in list(staging.iterdir()) if staging.is_dir() else []:
            os.replace(path, target / path.name)
    except Exception as error:
        raise OSError(
            f"{target}: could not be saved ({error}); nothing was left half-written. Free some space and run again, "
            "with --resume_from_checkpoint true if there is a checkpoint."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def leave_process_group(trainer: Trainer) -> None:
    """Close the group of processes, if there is one: with an open one a process may abort as it ends.

    The wrapper of DistributedDataParallel has to go first. If it is the group's last owner, then it waits for gloo's
    threads while it holds the interpreter's lock, for which one of them may be waiting in turn, to free a tensor
    (torch 2.13; pytorch/pytorch#56297). The group's own Python object waits without the lock.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()  # drops its references too and collects the garbage
    trainer.accelerator.end_training()


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    try:
        config, _ = parse_config(argv, parser)
        checkpoint = find_checkpoint(config)
    except ValueError as error:
        parser.error(str(error))
    output_dir = Path(config.output_dir)
    args = training_arguments(config)
    is_main = args.process_index == 0
    say = print if is_main else lambda *_: None
    for name in config.unused_options():
        say(f"note: {name} has no meaning for method {config.method} and is not used")
    if is_main and config.push_to_hub:
        # Now rather than after hours of training: a missing token or a name that is taken shows here.
        create_repo(config.hub_model_id, exist_ok=True)

    tokenizer = load_tokenizer(config)
    with args.main_process_first(desc="tokenizing"):
        train_dataset, eval_dataset = load_datasets(config, tokenizer)
    set_seed(config.seed)
    model = build_model(config, tokenizer)
    num_trainable, num_all = count_parameters(model)
    say(f"{config.method}: {num_trainable:,} of {num_all:,} parameters are trained ({num_trainable / num_all:.2%})")
    say(f"{len(train_dataset)} sequences to train on, {len(eval_dataset or [])} to evaluate on")
    trainer = AnswerTrainer(
        model=model,
        args=args,
        data_collator=AnswerCollator(tokenizer.pad_token_id),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        lr_magnitude=config.lr_magnitude if config.method == "dora" else None,
    )
    if config.merge and trainer.is_fsdp_enabled:
        raise ValueError("merge: not possible on weights sharded by FSDP; merge the saved adapter in one process.")

    if checkpoint is not None:
        say(f"continuing from {checkpoint}")
    with whole_checkpoints(output_dir) if is_main else contextlib.nullcontext():
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Trainer turned the cache off for training; a saved model should generate with it.
    model.config.use_cache = True
    with staged(output_dir) if is_main else contextlib.nullcontext(output_dir) as folder:
        trainer.save_model(str(folder))
    model.config.use_cache = False
    history, last_step = trainer.state.log_history, trainer.state.global_step
    metrics = next((entry for entry in history if "eval_loss" in entry and entry["step"] == last_step), {})
    if eval_dataset is not None and not metrics:
        metrics = trainer.evaluate()
    leave_process_group(trainer)
    if not is_main:
        return

    metrics = metrics | {"train_loss": result.training_loss, "step": last_step}
    with staged(output_dir) as folder:
        folder.mkdir()
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / "loss.png").write_bytes(draw_loss(trainer.state.log_history, f"{config.method}, {output_dir.name}"))
        (folder / "eval_results.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print("  ".join(f"{name} {metrics[name]:.4f}" for name in ("train_loss", "eval_loss") if name in metrics))
    print(f"saved to {output_dir}")
    if config.merge and config.method != "full":
        with staged(output_dir / "merged") as folder:
            merged = model.merge_and_unload()
            merged.config.use_cache = True
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        print(f"merged model saved to {output_dir / 'merged'}")
    if config.push_to_hub:
        # training_args.bin holds local paths.
        private = ["checkpoint-*/*", "merged/*", "training_args.bin"]
        upload_folder(repo_id=config.hub_model_id, folder_path=output_dir, ignore_patterns=private)
        print(f"pushed to {config.hub_model_id}")


if __name__ == "__main__":
    main()
