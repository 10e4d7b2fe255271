"""The analysis during a training by transformers' Trainer, or by one that calls its callbacks."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import transformers
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from .._files import atomic_write_text
from .change import Change
from .decomposition import Reference, copy_weights, decompose, is_adapted
from .history import History, to_history


class DecompositionCallback(transformers.TrainerCallback):
    """Records `decompose` during training, and costs one pass over the adapted weights at each record.

        callback = DecompositionCallback(steps=50, path="pattern.json")
        Trainer(model, ..., callbacks=[callback]).train()
        correlate(callback.history)

    Args:
        steps: A record is made every so many optimizer steps, and at the end.
        path: A JSON file, written whole at each record. A resumed run goes on from its records.
        reference: W0 of a fully fine-tuned model, as for `decompose`. Without it W0 is copied to CPU memory when
            training begins, in each module's dtype.
        adapter: The adapter's name.
        target: As for `decompose`.

    Attributes:
        history: One {"step", "module", "magnitude", "direction"} per record and module. On world process zero only.
        seconds: The time that the records of this training have taken.
    """

    def __init__(
        self,
        steps: int,
        path: str | os.PathLike[str] | None = None,
        reference: Reference | None = None,
        *,
        adapter: str = "default",
        target: str | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"expected steps of at least 1, found {steps}")
        self.steps, self.path, self.reference = steps, None if path is None else Path(path), reference
        self.adapter, self.target = adapter, target
        self.history: History = []
        self.seconds = 0.0
        self._weights0 = reference

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        if model is None or not state.is_world_process_zero:
            return
        self.history, self.seconds, self._weights0 = [], 0.0, self.reference
        if state.global_step and self.path is not None and self.path.is_file():
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self.history = [entry for entry in stored if entry["step"] <= state.global_step]
        if self.reference is None and not is_adapted(model):
            if state.global_step:
                raise ValueError(
                    f"training resumes at step {state.global_step}, where the weights are no longer the pretrained "
                    "ones; give DecompositionCallback the pretrained model as `reference`."
                )
            self._weights0 = copy_weights(model, self.target)
        # an adapter or a reference that is missing shows now, not at the first record
        self._changes(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        if state.global_step % self.steps == 0 or state.global_step >= state.max_steps:
            self._record(state, model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        # loading the best model has replaced the weights of the last step
        if not args.load_best_model_at_end:
            self._record(state, model)

    def _record(self, state: TrainerState, model: nn.Module | None) -> None:
        step = state.global_step
        recorded = bool(self.history) and self.history[-1]["step"] == step
        if model is None or not state.is_world_process_zero or recorded:
            return
        start = time.perf_counter()
        self.history += to_history(step, self._changes(model))
        if self.path is not None:
            atomic_write_text(str(self.path), json.dumps(self.history, indent=1) + "\n")
        self.seconds += time.perf_counter() - start

    def _changes(self, model: nn.Module) -> dict[str, Change]:
        return decompose(model, reference=self._weights0, adapter=self.adapter, target=self.target)
