"""Adapters over files, one module at a time, give what a loaded model gives, bit for bit."""

import json
import shutil

import pytest
import torch
from export_fixtures import gpt2, qwen
from format_fixtures import llama, saved
from peft import PeftModel
from safetensors.torch import load_file

from dora_peft import DoraConfig
from dora_peft.adapters.export.adapted import AdaptedBase, Trained
from dora_peft.adapters.formats import Checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Merging unties", "ignore:Input and output embeddings",
    "ignore:Setting `save_embedding_layers`", "ignore:Already following adapters were merged",
)  # fmt: skip
OPTIONS = {
    "plain": {},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "head-saved": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 3]},
    "tables": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "magnitudes": {"target_modules": ["q_proj"], "magnitude_only_modules": ["up_proj"]},
}


def made(tmp_path, base, dtype=torch.float32, **options):
    """A base in files, adapters over it, and the state dict of the merged model."""
    model = base().to(dtype)
    model.save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", model, **options)
    loaded = PeftModel.from_pretrained(base().to(dtype), tmp_path / "adapter")
    return Checkpoint(tmp_path / "base"), loaded.merge_and_unload().state_dict()


def check(adapted, merged):
    assert adapted.layers
    for path in adapted.layers:
        assert torch.equal(adapted.merged(path), merged[f"{path}.weight"]), path
        assert adapted.layers[path].get_base_layer().weight.is_meta
    trained = adapted.trained()
    for name, one in trained.items():
        assert torch.equal(one.over(adapted.names.read(name)), merged[name]), name
    return trained


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("what", OPTIONS)
def test_merged_weights_are_those_of_a_loaded_model(tmp_path, what, tied, dtype):
    checkpoint, merged = made(tmp_path, lambda: qwen(tied), dtype, **OPTIONS[what])
    trained = check(AdaptedBase(checkpoint, [tmp_path / "adapter"]), merged)
    expected = {"bias-all": 6, "bias-lora": 6, "head-saved": 1, "tokens": 1}.get(what, 0)
    assert len(trained) == expected


def test_layers_that_are_stored_the_other_way_round(tmp_path):
    checkpoint, merged = made(tmp_path, gpt2, target_modules=["c_attn", "c_proj", "c_fc", "wte"])
    check(AdaptedBase(checkpoint, [tmp_path / "adapter"]), merged)


def test_several_adapters_in_their_order(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    folders = [saved(tmp_path / "a"), saved(tmp_path / "b", r=2, target_modules=["q_proj", "up_proj"])]
    weights = []
    for order in (folders, folders[::-1]):
        model = PeftModel.from_pretrained(llama(), order[0])
        model.load_adapter(order[1], "second")
        model.base_model.set_adapter(["default", "second"])
        adapted = AdaptedBase(Checkpoint(tmp_path / "base"), order)
        check(adapted, model.merge_and_unload().state_dict())
        weights.append(adapted.merged("model.layers.0.self_attn.q_proj"))
    assert not torch.equal(*weights)


def test_rows_of_zeros_and_peft_s_own_folders(tmp_path):
    """Their ties are found when W0 is at hand."""
    base = llama()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[3] = 0
    base.save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", base)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    shutil.copytree(tmp_path / "adapter", tmp_path / "foreign")
    (tmp_path / "foreign" / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": None}))
    for name in ("adapter", "foreign"):
        fresh = llama()
        fresh.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"), strict=False)
        model = PeftModel.from_pretrained(
            fresh, tmp_path / name, config=DoraConfig.from_pretrained(tmp_path / name)
        ).merge_and_unload()  # fmt: skip
        adapted = AdaptedBase(Checkpoint(tmp_path / "base"), [tmp_path / name])
        check(adapted, model.state_dict())
        assert adapted.unrecorded == (name == "foreign")


def test_what_was_trained_is_put_over_what_is_stored():
    stored = torch.zeros(4, 2, dtype=torch.bfloat16)
    whole = Trained(torch.ones(4, 2)).over(stored)
    assert (whole.dtype, whole.sum().item()) == (torch.bfloat16, 8)
    rows = Trained(torch.ones(2, 2), torch.tensor([1, 3])).over(stored)
    assert rows[:, 0].tolist() == [0, 1, 0, 1]
    assert not stored.any()
