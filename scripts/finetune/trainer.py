"""Trainer with the loss per answer token, and how it leaves a group of processes."""

import pickle
from typing import Any

import torch
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from common.errors import OptionError, one_line
from dora_peft import param_groups
from finetune.encoding import IGNORE

# What a wrong option or checkpoint raises while Trainer prepares; pickle's are of broken files.
NOT_PREPARED = (ValueError, TypeError, LookupError, RuntimeError, EOFError, pickle.UnpicklingError)


class Beginning(TrainerCallback):
    """Whether a training is under way, with all that it needs made and loaded."""

    is_over = False

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.is_over = True


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

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Trainer's own.

        Raises:
            OptionError: data loader, optimizer or schedule cannot be made as the options say, or the checkpoint does
                not fit them.
        """
        beginning = Beginning()
        self.add_callback(beginning)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except NOT_PREPARED as error:
            if beginning.is_over or isinstance(error, OptionError):
                raise
            where = "before training" if resume_from_checkpoint is None else f"going on from {resume_from_checkpoint}"
            raise OptionError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
        finally:
            self.remove_callback(beginning)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """Trainer's own, of the groups of `dora_peft.param_groups`.

        Raises:
            OptionError: the optimizer lacks a package or an option, or makes its own groups although lr_magnitude is
                given.
        """
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(*args)
        model = args[0] if args and args[0] is not None else self.model
        try:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        except (ImportError, ValueError) as error:
            raise OptionError(f"optim: {error}") from error
        is_plain = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
        # GaLore, LOMO and their like come with their own parameters.
        if is_plain and not {"params", "model", "optimizer_dict"} & kwargs.keys():
            kwargs["params"] = param_groups(model, self.args.weight_decay, self.lr_magnitude)
        elif self.lr_magnitude is not None:
            raise OptionError(
                f"lr_magnitude: the optimizer {self.args.optim.value} makes its own groups; leave it out."
            )
        # Trainer takes a class with its arguments from here, `params` among them.
        self.optimizer_cls_and_kwargs = optimizer_class, kwargs
        try:
            return super().create_optimizer(*args)
        except (ValueError, TypeError) as error:
            raise OptionError(f"optim {self.args.optim.value}: {one_line(error)}") from error
        finally:
            self.optimizer_cls_and_kwargs = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        # Trainer's own figure depends on the batch size, and with several processes on the records that fill up the
        # last batch: 2.6 % off for 6 records in two processes.
        if "eval_answer_loss" in output.metrics:
            # It is not there with prediction_loss_only.
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
