"""How far training moved each module of saved models in magnitude and in direction (Eq. 3 and 4 of arXiv 2402.09353):

    dM = mean_j | m[j] - ||W0[j]|| |          m[j] = ||W[j]||, or DoRA's magnitude parameter
    dD = mean_j (1 - cos(W[j], W0[j]))        rows that are zero in W0 or W have no direction and are left out

    python -m dora_peft.analysis BASE ADAPTER... [--gguf_file F] [--output pattern.png] [--modules 'q_proj|v_proj']

BASE is a model folder or Hub id; each ADAPTER the folder of a LoRA, a DoRA or a fully fine-tuned model, or a training
run's output folder, whose checkpoint-*/ make one trajectory. Printed is the correlation of dD and dM of each run;
pattern.png shows it, pattern_trajectories.png too if a run has several checkpoints, pattern.json has all numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import transformers
from torch import nn
from tqdm.auto import tqdm

from .._files import atomic_write_text
from .correlation import Correlation, correlate
from .decomposition import decompose_folder
from .history import History, to_history
from .plots import draw_pattern, draw_trajectories, layer_kind

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def load_base(name: str, model_class: str = "AutoModelForCausalLM", gguf_file: str | None = None) -> nn.Module:
    """A pretrained model by folder or Hub id, unpacked if it is a GGUF file.

    Args:
        name: The folder or id.
        model_class: The class of transformers to load it by.
        gguf_file: The file in the folder or repository, if it is one.

    Raises:
        ValueError: transformers has no such class.
    """
    options: dict[str, object] = {"gguf_file": gguf_file}
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # older releases always unpack; newer ones may keep the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if not hasattr(transformers, model_class):
        raise ValueError(f"expected a model class of transformers, found {model_class!r}")
    return getattr(transformers, model_class).from_pretrained(name, **options)


def read_run(base_model: nn.Module, folder: str | os.PathLike[str], target: str | None = None) -> History:
    """The records of a saved model, or of all checkpoint-*/ in a training run's output folder.

    Args:
        base_model: The pretrained model.
        folder: The folder.
        target: As for `decompose`.
    """
    folder = Path(folder)
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in (folder, *folder.glob("checkpoint-*"))}
    steps = {path: int(match[1]) for path, match in found.items() if match} or {folder: 0}
    history: History = []
    for path in tqdm(sorted(steps, key=lambda path: steps[path]), desc=folder.name, disable=len(steps) == 1):
        history += to_history(steps[path], decompose_folder(base_model, path, target=target))
    return history


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` are its words, those of the process if None."""
    parser = _parser()
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
    print(f"{'run':32} {'points':>6}  {'r of dD and dM':>14}  95 % interval")
    found = {name: {"folder": str(runs[name]), **_report(name, history)} for name, history in histories.items()}
    content = {"base": args.base, "level": 0.95, "runs": found}
    atomic_write_text(str(args.output.with_suffix(".json")), json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.output} and {args.output.with_suffix('.json')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m dora_peft.analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="folder or Hub id of the pretrained model")
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+", type=Path, help="folder of an adapter, model or run")
    parser.add_argument("--gguf_file", help="GGUF file in BASE")
    parser.add_argument("--model_class", default="AutoModelForCausalLM", help="class of transformers to load BASE by")
    parser.add_argument("--modules", metavar="REGEX", help="searched in the paths of the modules")
    parser.add_argument("--output", type=Path, default=Path("pattern.png"), help="figure; the numbers lie beside it")
    return parser


def _report(run: str, history: History) -> dict[str, object]:
    """Print the correlation over all modules of a run and over those of each kind, and give them for the JSON file."""
    groups: dict[str, History] = {}
    for entry in history:
        groups.setdefault(layer_kind(entry["module"]), []).append(entry)
    whole, kinds = correlate(history), {kind: correlate(entries) for kind, entries in groups.items()}
    for label, (r, low, high, count) in ((run, whole), *((f"  {kind}", found) for kind, found in kinds.items())):
        print(f"{label:32} {count:6}  {r:+14.2f}  [{low:+.2f}, {high:+.2f}]")
    return {
        "correlation": _to_json(whole),
        "kinds": {kind: _to_json(found) for kind, found in kinds.items()},
        "history": history,
    }


def _to_json(found: Correlation) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}
