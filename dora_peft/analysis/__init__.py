"""How far training moved each module in magnitude and in direction: the paper's weight-decomposition analysis.

Per output row j, with W0 the pretrained and W the trained weight (Eq. 3 and 4 of arXiv 2402.09353):

    dM = mean_j | m[j] - ||W0[j]|| |          m[j] = ||W[j]||, or DoRA's magnitude parameter
    dD = mean_j (1 - cos(W[j], W0[j]))        rows that are zero in W0 or W have no direction and are left out

    python -m dora_peft.analysis BASE ADAPTER... [--gguf_file F] [--output pattern.png] [--modules 'q_proj|v_proj']

BASE is a model folder or Hub id; each ADAPTER the folder of a LoRA, a DoRA or a fully fine-tuned model, or a training
run's output folder, whose checkpoint-*/ make one trajectory. Printed is the correlation of dD and dM of each run;
pattern.png shows it, pattern_trajectories.png too where a run has several checkpoints, pattern.json has all numbers.

W0 is the base layer's weight as it is; PiSSA and its kin, which change it, are compared with that. Weights that are
sharded across processes (FSDP, ZeRO-3) have to be saved first and read by `decompose_folder`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from tqdm.auto import tqdm

from .._files import atomic_write_text
from .correlation import Correlation, History, correlate, correlate_by_step
from .decomposition import (
    Change,
    compare_low_rank,
    compare_weights,
    copy_weights,
    decompose,
    decompose_folder,
    is_adapted,
)
from .plots import draw_correlations, draw_pattern, draw_trajectories, layer_kind

__all__ = [
    "Change",
    "Correlation",
    "DecompositionCallback",
    "History",
    "compare_low_rank",
    "compare_weights",
    "correlate",
    "correlate_by_step",
    "decompose",
    "decompose_folder",
    "draw_correlations",
    "draw_pattern",
    "draw_trajectories",
    "layer_kind",
    "load_base",
    "main",
    "read_run",
    "to_history",
]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class DecompositionCallback(transformers.TrainerCallback):
    """Records `decompose` during training, and costs one pass over the adapted weights at each record.

        callback = DecompositionCallback(steps=50, path="pattern.json")
        Trainer(model, ..., callbacks=[callback]).train()
        correlate(callback.history)

    Args:
        steps: A record is made every so many optimizer steps, and at the end.
        path: A JSON file, written whole at each record. A resumed run goes on from its records.
        reference: W0 of a fully fine-tuned model, as for `decompose`. Without it W0 is copied to CPU memory when
            training begins, in each module's own dtype.
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
        reference: Any = None,
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

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
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
        self._changes(model)  # an adapter or a reference that is missing shows now, not at the first record

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0 or state.global_step >= state.max_steps:
            self._record(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not args.load_best_model_at_end:  # which has replaced the weights of the last step
            self._record(state, model)

    def _record(self, state: Any, model: Any) -> None:
        step = state.global_step
        if not state.is_world_process_zero or (self.history and self.history[-1]["step"] == step):
            return
        start = time.perf_counter()
        self.history += to_history(step, self._changes(model))
        if self.path is not None:
            atomic_write_text(str(self.path), json.dumps(self.history, indent=1) + "\n")
        self.seconds += time.perf_counter() - start

    def _changes(self, model: Any) -> dict[str, Change]:
        return decompose(model, reference=self._weights0, adapter=self.adapter, target=self.target)


def to_history(step: int, changes: Mapping[str, Change]) -> History:
    """One {"step", "module", "magnitude", "direction"} per module."""
    return [{"step": step, "module": name, **change._asdict()} for name, change in changes.items()]


def load_base(name: str, model_class: str = "AutoModelForCausalLM", gguf_file: str | None = None) -> nn.Module:
    """A pretrained model by folder or Hub id, unpacked where it is a GGUF file."""
    options: dict[str, Any] = {"gguf_file": gguf_file}
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Older releases always unpack; newer ones may keep the weights packed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if not hasattr(transformers, model_class):
        raise ValueError(f"expected a model class of transformers, found {model_class!r}")
    return getattr(transformers, model_class).from_pretrained(name, **options)


def read_run(base_model: nn.Module, folder: str | os.PathLike[str], target: str | None = None) -> History:
    """The records of a saved model, or of all checkpoint-*/ in a training run's output folder."""
    folder = Path(folder)
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in (folder, *folder.glob("checkpoint-*"))}
    steps = {path: int(match[1]) for path, match in found.items() if match} or {folder: 0}
    history: History = []
    for path in tqdm(sorted(steps, key=lambda path: steps[path]), desc=folder.name, disable=len(steps) == 1):
        history += to_history(steps[path], decompose_folder(base_model, path, target=target))
    return history


def to_json(found: Correlation) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m dora_peft.analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="folder or Hub id of the pretrained model")
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+", type=Path, help="folder of an adapter, model or run")
    parser.add_argument("--gguf_file", help="GGUF file in BASE")
    parser.add_argument("--model_class", default="AutoModelForCausalLM", help="class of transformers to load BASE by")
    parser.add_argument("--modules", metavar="REGEX", help="searched in the paths of the modules")
    parser.add_argument("--output", type=Path, default=Path("pattern.png"), help="figure; the numbers lie beside it")
    args = parser.parse_args(argv)
    names = [path.name for path in args.adapters]
    runs = {str(path) if names.count(path.name) > 1 else path.name: path for path in args.adapters}
    try:
        re.compile(args.modules or "")
        base = load_base(args.base, args.model_class, args.gguf_file)
        histories = {name: read_run(base, path, args.modules) for name, path in runs.items()}
        draw_pattern(histories, f"{Path(args.base).name}: magnitude and direction", args.output)
        if any(len({entry["step"] for entry in history}) > 1 for history in histories.values()):
            second = args.output.with_stem(f"{args.output.stem}_trajectories")
            draw_trajectories(histories, f"{Path(args.base).name}: change by kind of layer", second)
    except (ValueError, OSError, ImportError, re.error) as error:
        parser.error(str(error))
    content: dict[str, Any] = {"base": args.base, "level": 0.95, "runs": {}}
    print(f"{'run':32} {'points':>6}  {'r of dD and dM':>14}  95 % interval")
    for name, history in histories.items():
        groups: dict[str, History] = {}
        for entry in history:
            groups.setdefault(layer_kind(entry["module"]), []).append(entry)
        whole, kinds = correlate(history), {kind: correlate(entries) for kind, entries in groups.items()}
        for label, (r, low, high, count) in ((name, whole), *((f"  {kind}", found) for kind, found in kinds.items())):
            print(f"{label:32} {count:6}  {r:+14.2f}  [{low:+.2f}, {high:+.2f}]")
        content["runs"][name] = {
            "folder": str(runs[name]),
            "correlation": to_json(whole),
            "kinds": {kind: to_json(found) for kind, found in kinds.items()},
            "history": history,
        }
    atomic_write_text(str(args.output.with_suffix(".json")), json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.output} and {args.output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
