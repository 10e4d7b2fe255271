"""What other tools' own software makes of adapters that `dora-peft convert` wrote, and what it reads of theirs.

    bash scripts/engines.sh formats                  # makes the environments and runs all of it

    python scripts/check_formats.py make FOLDER      # a base, inputs, and an adapter in every format
    python scripts/engine_lycoris.py FOLDER         # in the tool's environment: its outputs, and an adapter of its own
    python scripts/check_formats.py compare FOLDER   # the table

Expected result of `compare`: for each tool and direction the largest |y - y_ref| / max |y_ref| over all modules, where
y_ref is x W'^T by dora_peft/reference.py in fp64; as formats.json in --results, which README's table comes from.
Formats whose software is not run here are compared with an independent restatement of their readers' formula
(tests/adapters/formats).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from common.files import write_json
from common.formats_table import WAYS, formats_table
from common.machine import describe_machine
from dora_peft import reference
from dora_peft.adapters import FORMATS, convert
from dora_peft.adapters.convert import read_as
from dora_peft.adapters.formats import Adapter, Base, Module, format_of, read_source, write_files

# What is done by each tool itself; the rest is compared with a restatement of its formula.
TOOLS = ("peft", "lycoris", "mlx", "torchtune")
BOUND = 1e-5


def make(folder: Path) -> None:
    """The base, the inputs, and one adapter in every format."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, vocab_size=32, head_dim=12, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "llama")
    modules, linear, inputs = {}, {}, {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and path != "lm_head":
            weight = layer.weight.detach()
            lora_A, lora_B = torch.randn(4, weight.shape[1]), 0.1 * torch.randn(len(weight), 4)
            norm = reference.weight_norm(weight, lora_A, lora_B, 1.5)
            modules[path] = Module(lora_A, lora_B, 6.0, norm * (1 + 0.02 * torch.randn(len(weight))))
            linear[f"{path}.weight"] = weight.clone()
            inputs[path] = torch.randn(7, weight.shape[1])
    (folder / "base").mkdir()
    save_file(linear, folder / "base" / "model.safetensors")
    save_file(inputs, folder / "inputs.safetensors")
    shutil.copy(folder / "llama" / "config.json", folder / "base")
    write_files(FORMATS["peft"].write(Adapter(modules), None), folder / "peft")
    for name in FORMATS:
        if name != "peft":
            convert(folder / "peft", folder / name, name, base=folder / "llama")


def expected(adapter: Adapter, folder: Path) -> dict[str, Tensor]:
    """x W'^T of each module by reference.py, in fp64; and the logits of the whole model with these weights."""
    weights, inputs = load_file(folder / "base" / "model.safetensors"), load_file(folder / "inputs.safetensors")
    model = LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float64).eval()
    out = {}
    for path, module in adapter.modules.items():
        assert module.magnitude is not None
        lora_A, lora_B, m = (t.double() for t in (module.lora_A, module.lora_B, module.magnitude))
        weight = reference.dora_weight(weights[f"{path}.weight"].double(), lora_A, lora_B, m, module.scaling)
        out[path] = inputs[path].double() @ weight.T
        model.get_submodule(path).weight.data = weight
    with torch.no_grad():
        return {**out, "logits": model(torch.arange(10)[None]).logits}


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest |y - y_ref| / max |y_ref| over what a tool gave: outputs of all modules, or the logits alone."""
    names = wanted.keys() - {"logits"}
    if found.keys() not in (names, {"logits"}):
        raise SystemExit(f"error: outputs of {sorted(found.keys() ^ names)[:3]} are missing or too many")
    return max(((y.double() - wanted[p]).abs().max() / wanted[p].abs().max()).item() for p, y in found.items())


def compare(folder: Path, results: Path) -> bool:
    """Store and print what the tools gave; whether all is within the bound."""
    base = Base(folder / "llama")
    path = results / "formats.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = stored.get("rows", {})
    for name in TOOLS:
        if not (folder / f"{name}.json").is_file():
            continue
        read = error(load_file(folder / f"{name}_read.safetensors"), expected(_read(folder / name, base), folder))
        outputs = load_file(folder / f"{name}_made.safetensors")
        wrote = error(outputs, expected(_read(folder / f"{name}_made", base), folder))
        if (folder / f"{name}_exported").is_dir():
            wrote = max(wrote, error(outputs, expected(_read(folder / f"{name}_exported", base, name), folder)))
        versions = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        rows[name] = {"versions": versions, **dict(zip(WAYS, (read, wrote), strict=True))}
    results.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": describe_machine(torch.device("cpu")), "bound": BOUND, "rows": rows})
    print(formats_table(rows))
    return all(row[way] <= BOUND for row in rows.values() for way in WAYS)


def _read(folder: Path, base: Base, name: str | None = None) -> Adapter:
    source = read_source(folder)
    return read_as(source, name or format_of(source), base)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=Path("scripts/engines"))
    options = parser.parse_args(argv)
    if options.what == "make":
        make(options.folder)
    elif not compare(options.folder, options.results):
        sys.exit(1)


if __name__ == "__main__":
    main()
