"""Folders to push: an adapter, and exports as `dora-peft export` writes them, with made-up numbers."""

from dataclasses import replace
from pathlib import Path

from format_fixtures import llama, saved

from dora_peft.adapters.export import Record

BASE = "user/tiny-llama"
MODULES = {
    "model.layers.0.mlp.down_proj": {"error_over_update": 0.25, "share_lost": 0.0},
    "model.layers.1.mlp.down_proj": {"error_over_update": 0.0625, "share_lost": 0.5},
}


def record(route: str, **changes: object) -> Record:
    statement = {"exact": "exact up to rounding of W0 to float16", "lora": "approximate: rank 8"}.get(route, "merged")
    totals = {"error_over_update": 0.125, "share_lost": 0.25}
    command = f"dora-peft export adapter --base {BASE} --out out --as {route}"
    made = Record(route, "float16", BASE, ["runs/adapter"], statement, totals, MODULES, ["lm_head is untied"], command)
    return replace(made, **changes)


def adapter(folder: Path, base: str = BASE) -> Path:
    model = llama()
    model.config._name_or_path = base
    return saved(folder, model, target_modules=["down_proj"], task_type="CAUSAL_LM")


def export(folder: Path, route: str, **changes: object) -> Path:
    """An export by a route, in parts for "exact"."""
    made = record(route, **changes)
    model, lora = {"exact": (folder / "base", folder / "adapter"), "merged": (folder, None)}.get(route, (None, folder))
    if model is not None:
        llama().save_pretrained(model)
        made.write(model)
    if lora is not None:
        adapter(lora)
        (lora / "README.md").unlink()
        made.write(lora)
    (folder / "manifest.json").write_text("{}")
    return folder
