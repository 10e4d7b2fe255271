"""Trainer with the loss per answer token, its arguments, and how it leaves a group of processes."""

import dataclasses
from typing import Any

import torch
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from dora_peft import param_groups
from finetune.config import FinetuneConfig
from finetune.data import IGNORE


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


def leave_process_group(trainer: Trainer) -> None:
    """Close the group of processes, if there is one: with an open one a process may abort as it ends.

    The wrapper of DistributedDataParallel has to go first. If it is the group's last owner, then it waits for gloo's
    threads while it holds the interpreter's lock, for which one of them may be waiting in turn, to free a tensor
    (torch 2.13; pytorch/pytorch#56297). The group's own Python object waits without the lock.
    """
    trainer.model_wrapped = trainer.model
    # drops its references too and collects the garbage
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
