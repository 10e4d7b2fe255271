"""`dora_peft.adapters.info`: what the files hold."""

import pytest
import torch
from format_fixtures import llama, saved
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_peft.adapters import FORMATS, UnreadableError, convert, info

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


@pytest.mark.parametrize("name", FORMATS)
def test_of_every_format(tmp_path, name):
    folder = saved(tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    convert(folder, tmp_path / "out", name, base=llama())
    base = llama()
    found = info(tmp_path / "out", base=base, source_format=name)
    assert found.format == name
    parts = ("mlp.down_proj", "self_attn.q_proj")
    assert sorted(module.path for module in found.modules) == [f"model.layers.{i}.{p}" for i in range(2) for p in parts]
    module = next(module for module in found.modules if module.path.endswith("down_proj"))
    assert (module.shape, module.rank) == ((24, 40), 4)
    assert module.alpha == (4 if name == "ai-toolkit" else 12)
    assert set(module.dtypes) == {"float32"}
    # the fixture moves magnitudes by 1 %
    assert 0.002 < module.change < 0.03


def test_without_a_base_and_of_a_plain_lora(tmp_path):
    get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])).save_pretrained(
        tmp_path / "lora"
    )
    found = info(tmp_path / "lora")
    assert [module.change for module in found.modules] == [None, None]
    assert [len(module.dtypes) for module in found.modules] == [2, 2]
    assert found.others == ["lm_head.weight"]
    assert found.nbytes == 4 * (2 * 3 * 48 + 32 * 24)


def test_norms_per_input_column_are_described(tmp_path):
    folder = saved(tmp_path / "adapter", target_modules=["down_proj"])
    convert(folder, tmp_path / "a.safetensors", "lycoris")
    tensors = load_file(tmp_path / "a.safetensors")
    columns = {key: torch.ones(1, 40) if key.endswith("dora_scale") else t for key, t in tensors.items()}
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        save_file(columns, tmp_path / "b.safetensors", metadata=file.metadata())
    found = info(tmp_path / "b.safetensors")
    assert len(found.modules) == 2
    assert found.notes[0] == (
        "model.layers.0.mlp.down_proj has a norm per input column, which is no DoRA per output row"
    )
    with pytest.raises(UnreadableError, match="norm per input column"):
        convert(tmp_path / "b.safetensors", tmp_path / "out", "peft")


def test_zero_rows_have_no_change(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[2] = 0
    folder = saved(tmp_path / "adapter", model, target_modules=["q_proj"])
    again = llama()
    with torch.no_grad():
        again.model.layers[0].self_attn.q_proj.weight[2] = 0
    assert all(module.change < 0.03 for module in info(folder, base=again).modules)
