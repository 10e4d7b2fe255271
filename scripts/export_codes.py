"""What a quantised base keeps of a DoRA adapter: c in the scales of its codes, beside merging and quantising again.

    python scripts/export_codes.py --base outputs/smollm2 --adapter outputs/demo/dora

with the adapter of scripts/demo.sh and the base of `prepare_smollm2.py --safetensors`. Runs on a CPU in minutes, by
bitsandbytes. For each of its formats the base is quantised as transformers does it, once as a model in fp16 and once in
bf16, in which it is exported too, and W' is that of the adapter over the quantised base. Expected result: error /
update over all adapted weights is some hundredths with c in the scales, and 0.7 to 0.8 after merging and quantising
again: most of the update is lost. Stored in scripts/engines/codes.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from common.files import write_json
from common.machine import describe_machine
from dora_peft.adapters.export import NAMED, export
from dora_peft.adapters.export.adapted import AdaptedBase
from dora_peft.adapters.export.requantised import Quantised
from dora_peft.adapters.formats import Checkpoint
from dora_peft.adapters.formats.base import skeleton

FORMATS = ("nf4", "fp4", "int8")


def quantised_checkpoint(base: Path, name: str, dtype: torch.dtype, folder: Path) -> Path:
    """The base as transformers saves it after bitsandbytes, everything else in `dtype`."""
    record = NAMED[name] or {}
    config = BitsAndBytesConfig(**{key: value for key, value in record.items() if key != "quant_method"})
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=dtype, device_map="cpu")
    model.save_pretrained(folder)
    return folder


def quantised_again(checkpoint: Path, adapter: Path, name: str) -> float:
    """Error / update of W' after it is quantised as the base was."""
    adapted = AdaptedBase(Checkpoint(checkpoint), [adapter], base_quantization=name)
    model = skeleton(adapted.checkpoint.config)
    assert model is not None
    quantised = Quantised(NAMED[name] or {}, model)
    error = update = 0.0
    for path in adapted.layers:
        merged = adapted.merged(path, torch.float32)
        served = quantised.rounded(path, merged.half()).float()
        error += (served - merged).square().sum().item()
        update += (merged - adapted.stored(path).float()).square().sum().item()
    return sqrt(error / update)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("scripts/engines"))
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in FORMATS:
            for dtype in (torch.float16, torch.bfloat16):
                checkpoint = quantised_checkpoint(options.base, name, dtype, Path(scratch) / name)
                done = export(
                    options.adapter, checkpoint, Path(scratch) / "out", "exact", dtype=dtype, dry_run=True,
                    base_quantization=name,
                )  # fmt: skip
                rows.append({"format": name, "dtype": done.dtype, "in_scales": done.totals["error_over_update"]})
                if dtype == torch.float16:
                    rows[-1]["quantised_again"] = quantised_again(checkpoint, options.adapter, name)
                print(rows[-1], flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(torch.device("cpu"))
    write_json(options.results / "codes.json", {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
