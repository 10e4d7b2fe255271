"""The command line of scripts/benchmark.py, and the file that a run is stored in."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import DTYPES, SHAPES
from benchmarks.contenders import CONTENDERS
from benchmarks.report import RESULTS
from benchmarks.suites import SUITES
from common.arguments import positive

CHECKPOINTING = ("none", "reentrant", "non-reentrant")
# the unit of all ratios, and what the other DoRAs have to equal
ALWAYS = ["lora", "peft_dora"]


DEFAULT = [*ALWAYS, "dora", "dora:torch", "dora:reference", "dora:triton", "frozen", "lora_floor"]
OF_SUITE = {"refresh": ["dora"], "resident": ["dora"], "idle": ["lora_idle", "dora", "dora_idle"]}
# the output layer, which no adapter touches, would outweigh a few cut layers on a CPU
CPU_VOCABULARY = 2048


# What a stored result is not distinguished by.
NOT_OPTIONS = ("json", "results", "resume", "worker", "force", "known")


def listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values separated by commas."""

    def read(text: str) -> list[Any]:
        return [convert(part) for part in text.split(",")]

    return read


def contender(text: str) -> str:
    if text not in CONTENDERS:
        raise argparse.ArgumentTypeError(f"unknown contender {text!r}, expected some of {','.join(CONTENDERS)}")
    return text


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a dropout probability from 0 to below 1, found {text!r}")
    return value


def checkpointing(text: str) -> str:
    if text not in CHECKPOINTING:
        raise argparse.ArgumentTypeError(f"unknown checkpointing {text!r}, expected some of {','.join(CHECKPOINTING)}")
    return text


def layer_shape(text: str) -> tuple[int, int]:
    inputs, separator, outputs = text.partition("x")
    if not (separator and inputs.isdigit() and outputs.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a layer's shape as INxOUT, such as 1024x4096, found {text!r}")
    return int(inputs), int(outputs)


def read_options(argv: Sequence[str], description: str | None = None) -> argparse.Namespace:
    """Parse the command line of scripts/benchmark.py and fill in what depends on the suite and the device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--model", choices=SHAPES, default="llama-512", help="widths of the model (llama-512)")
    parser.add_argument("--layers", type=positive, help="decoder layers (the model's own number)")
    parser.add_argument("--vocab", type=positive, help=f"vocabulary (the model's; at most {CPU_VOCABULARY} on a CPU)")
    parser.add_argument("--shapes", type=listed(layer_shape), help="suites layer, refresh: INxOUT,... (the model's)")
    parser.add_argument("--contenders", type=listed(contender), help="besides lora and peft_dora (all that fit)")
    parser.add_argument("--compile", action="store_true", help="add lora_compiled and dora_compiled")
    parser.add_argument("--rank", type=listed(positive), default=[16], help="ranks (16)")
    parser.add_argument("--dropout", type=listed(probability), default=[0.0], help="dropouts (0)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the base model; `memory` takes both (fp32)")
    parser.add_argument("--adapter-dtype", choices=DTYPES, default="fp32", help="bf16 over a bf16 base only (fp32)")
    parser.add_argument("--checkpointing", type=listed(checkpointing), help=f"some of {','.join(CHECKPOINTING)} (none)")
    parser.add_argument("--batch", type=positive, help="sequences per micro-batch (4; decode 1)")
    parser.add_argument("--seq-len", type=positive, help="tokens per sequence, decode: of the prompt (256; decode 64)")
    parser.add_argument("--accumulation", type=positive, default=1, help="micro-batches per optimizer step (1)")
    parser.add_argument("--new-tokens", type=positive, default=16, help="suite decode: tokens behind the prompt (16)")
    parser.add_argument("--rounds", type=positive, default=9, help="timed rounds (9)")
    parser.add_argument("--warmup", type=positive, default=2, help="rounds before them (2)")
    parser.add_argument("--repeats", type=positive, default=5, help="memory, resident: processes per contender (5)")
    parser.add_argument("--no-peak", dest="peak", action="store_false", help="suite memory: without peak memory")
    parser.add_argument("--threads", type=positive, help="of torch on the CPU (torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, help="cpu or cuda (cuda if there is one)")
    parser.add_argument("--tag", default="", help="end of the file's name, for variants of a run")
    parser.add_argument("--json", type=Path, help="where to write instead")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--force", action="store_true", help="`all`: repeat runs whose result is there already")
    parser.add_argument("--resume", action="store_true", help="keep what a run of these files and options has measured")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.adapter_dtype == "bf16" and options.dtype != "bf16":
        parser.error("--adapter-dtype bf16 needs --dtype bf16: PEFT keeps an adapter in bf16 over a bf16 base only")

    shape, decode = SHAPES[options.model], options.suite == "decode"
    if options.device is None:
        options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.layers is None:
        options.layers = shape.layers
    if options.vocab is None:
        cut = options.device.type == "cpu" and options.suite != "resident"
        options.vocab = min(shape.vocab, CPU_VOCABULARY) if cut else shape.vocab
    if options.batch is None:
        options.batch = 1 if decode else 4
    if options.seq_len is None:
        options.seq_len = 64 if decode else 256
    if options.checkpointing is None:
        options.checkpointing = ["none", "non-reentrant"] if options.suite == "memory" else ["none"]
    if options.contenders is None:
        options.contenders = list(OF_SUITE.get(options.suite, DEFAULT))
        options.contenders += ["peft_dora_cached"] if options.suite in ("eval", "decode") else []
    options.contenders += ["lora_compiled", "dora_compiled"] if options.compile else []
    options.contenders = [name for name in CONTENDERS if name in {*ALWAYS, *options.contenders}]
    return options


def result_path(options: argparse.Namespace) -> Path:
    """Where a run is stored: SUITE_MODEL_DEVICE[_TAG].json, with the shapes for MODEL if they were given."""
    model = options.model
    if options.shapes is not None:
        model = "+".join(f"{inputs}x{outputs}" for inputs, outputs in options.shapes)
    parts = [options.suite, model, options.device.type, options.tag]
    return options.json or options.results / ("_".join(filter(None, parts)) + ".json")


def stored_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they are in the JSON file, read back from JSON so that they compare equal."""
    kept = {name: value for name, value in vars(options).items() if name not in NOT_OPTIONS}
    return json.loads(json.dumps(kept | {"device": str(options.device)}))
