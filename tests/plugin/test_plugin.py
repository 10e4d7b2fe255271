"""The entry in PEFT's registry and the patches: present once, in any order of imports, and for DoRA alone."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.config import PeftConfigMixin
from peft.helpers import rescale_adapter_scale
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

import dora_peft
from dora_peft import DoraConfig, DoraModel, plugin

ROOT = Path(__file__).parents[2]
OPTIONAL = ("triton", "bitsandbytes", "torchao", "matplotlib", "datasets", "trl")


def run_python(code):
    """Run `code` in a fresh interpreter and return its last printed line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def patches():
    """Every patched attribute, as (owner, name)."""
    methods = ("__init__", "save_pretrained", "load_adapter", "from_pretrained", "add_adapter", "set_adapter")
    named = [(PeftModel, name) for name in (*methods, "_upload_modified_files")]
    named += [(PeftAdapterMixin, n) for n in ("load_adapter", "add_adapter", "set_adapter", "delete_adapter")]
    named += [(PeftConfigMixin, n) for n in ("_get_peft_type", "from_peft_type", "from_pretrained", "from_json_file")]
    return [*named, (peft.peft_model, "load_peft_weights"), (peft.utils.save_and_load, "load_peft_weights")]


def test_the_mappings():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DORA] is DoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.DORA] is DoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.DORA] == DoraModel.prefix


WORKS = """
import torch
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), dora_peft.DoraConfig(target_modules=["0"]))
works = str(model.peft_type) == "PeftType.DORA" and isinstance(model.base_model.model[0], dora_peft.DoraLayer)
"""


def test_imported_before_peft_and_without_any_optional_library():
    code = f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None
import dora_peft
import peft, transformers
{WORKS}
print(works)
"""
    assert run_python(code) == "True"


def test_imported_after_peft_then_again_and_reloaded():
    """It loads no optional library that PEFT and transformers had not loaded, and a reload leaves one of everything."""
    code = f"""
import importlib, sys
import transformers.pytorch_utils, peft.tuners.lora
from peft import PeftModel, PeftType
before = set({OPTIONAL}) & sys.modules.keys()
import dora_peft
import dora_peft
light = set({OPTIONAL}) & sys.modules.keys() == before
members, member = list(PeftType), PeftType.DORA
original = PeftModel.save_pretrained._dora_peft_original
importlib.reload(dora_peft.plugin)
importlib.reload(dora_peft)
for name in [n for n in sys.modules if n.partition(".")[0] == "dora_peft"]:
    del sys.modules[name]
import dora_peft
same = list(PeftType) == members and PeftType.DORA is member
once = PeftModel.save_pretrained._dora_peft_original is original and not hasattr(original, "_dora_peft_original")
{WORKS}
print(light, same, once, works)
"""
    assert run_python(code) == "True True True True"


def test_a_type_that_another_package_has_taken_is_refused(monkeypatch):
    class OtherConfig(peft.PeftConfig):
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.DORA, OtherConfig)
    with pytest.raises(ImportError, match=r"taken by .*OtherConfig.*one of the two"):
        plugin.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DORA] is OtherConfig


def test_every_public_name_exists():
    for name in dora_peft.__all__:
        assert getattr(dora_peft, name) is not None


def test_patches_do_not_stack():
    def originals():
        return [getattr(owner.__dict__[name], "_dora_peft_original", None) for owner, name in patches()]

    before = originals()
    assert None not in before
    plugin.register()
    assert originals() == before
    assert not any(hasattr(original, "_dora_peft_original") for original in before)


def test_patched_functions_keep_name_and_documentation():
    for owner, name in patches():
        function = getattr(owner, name)
        assert function.__name__ == name
    assert "adapter" in PeftModel.save_pretrained.__doc__


def save_plain(folder):
    """A LoRA adapter, and one of PEFT's own use_dora. Its source also runs where this package is not imported."""
    for use_dora in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=use_dora)
        get_peft_model(model, config).save_pretrained(f"{folder}/{use_dora}")


def test_plain_lora_saves_and_loads_as_without_this_package(tmp_path):
    program = f"""
import sys, torch
from torch import nn
from peft import LoraConfig, get_peft_model
{inspect.getsource(save_plain)}
save_plain({str(tmp_path / "without")!r})
print("dora_peft" in sys.modules)
"""
    assert run_python(program) == "False"
    save_plain(tmp_path / "with")
    files = {f.relative_to(tmp_path / "without") for f in (tmp_path / "without").rglob("*") if f.is_file()}
    assert files == {f.relative_to(tmp_path / "with") for f in (tmp_path / "with").rglob("*") if f.is_file()}
    for file in files:
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes(), file
    x = torch.randn(3, 6)
    for folder in (tmp_path / "with").iterdir():
        loaded = PeftModel.from_pretrained(mlp(), folder)
        loaded.load_adapter(folder, "second")
        assert {type(c) for c in loaded.peft_config.values()} == {LoraConfig}
        first = loaded(x)
        loaded.set_adapter("second")
        assert torch.equal(first, loaded(x))
        assert not torch.allclose(first, mlp()(x))


def test_rescale_adapter_scale_still_takes_lora():
    model = get_peft_model(mlp(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    before = model.base_model.model[0].scaling["default"]
    with rescale_adapter_scale(model, 0.5):
        assert model.base_model.model[0].scaling["default"] == 0.5 * before
    assert model.base_model.model[0].scaling["default"] == before
