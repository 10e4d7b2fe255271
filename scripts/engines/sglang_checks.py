"""What SGLang asks of an adapter's configuration, by SGLang's own code, which needs neither its kernels nor a GPU.

Its packages import CUDA's; so its reader of the configuration is loaded as a file, and three functions are taken out of
the sources of its manager and its memory pool: they use nothing but the configuration.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import types
import typing
from importlib.metadata import Distribution, distribution
from pathlib import Path

# Where each function stands; the names that they use besides Python's own.
FUNCTIONS = {
    "validate_new_adapter": "lora_manager.py",
    "can_support": "mem_pool.py",
    "get_normalized_target_modules": "utils.py",
}


def _source(sglang: Distribution, file: str) -> Path:
    return Path(str(sglang.locate_file(f"sglang/srt/lora/{file}")))


def _function(sglang: Distribution, name: str, names: dict[str, object]) -> None:
    """Add one function of SGLang's sources to `names`, among which it finds what it calls."""
    path = _source(sglang, FUNCTIONS[name])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    # Annotations name classes of modules that are not loaded.
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, found], []), str(path), "exec"), names)


def check(adapter: Path, modules: set[str]) -> dict[str, typing.Any]:
    """What SGLang makes of an adapter's folder.

    Args:
        adapter: the folder.
        modules: names of the modules that the server has buffers for, as `--lora-target-modules` takes them.

    Returns:
        What it multiplies the update by, `scaling`.

    Raises:
        ValueError: SGLang's, with its reason.
        importlib.metadata.PackageNotFoundError: there is no SGLang here.
    """
    sglang = distribution("sglang")
    spec = importlib.util.spec_from_file_location("sglang_lora_config", _source(sglang, "lora_config.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names: dict[str, typing.Any] = {**vars(typing), "LoRAConfig": module.LoRAConfig, "logger": logging.getLogger()}
    for name in FUNCTIONS:
        _function(sglang, name, names)
    config = module.LoRAConfig(str(adapter))
    if not isinstance(config.target_modules, list):
        raise ValueError(f"target_modules is no list of names of modules: {config.target_modules!r}")
    pool = types.SimpleNamespace(
        max_lora_rank=config.r,
        lora_added_tokens_size=0,
        target_modules=names["get_normalized_target_modules"](sorted(modules)),
    )
    pool.can_support = types.MethodType(names["can_support"], pool)
    manager = types.SimpleNamespace(
        attn_dp_enabled=False, lora_refs={}, memory_pool=pool, num_pinned_loras=0, max_loras_per_batch=8
    )
    reference = types.SimpleNamespace(lora_name="adapter", lora_path=str(adapter), pinned=False)
    names["validate_new_adapter"](manager, config, reference)
    return {"scaling": config.lora_alpha / config.r}
