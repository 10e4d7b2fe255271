"""W0 from files equals W0 of the model, for every kind of module, and what is no base is said in one line."""

import json

import pytest
import torch
from format_fixtures import llama, module
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from dora_peft.adapters.formats import Adapter, Base, Module, UnreadableError


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)).eval()


def for_layer(layer):
    """A module that fits a layer's weight."""
    weight = layer.weight
    turned = not isinstance(layer, nn.Linear)
    out, columns = (weight.shape[1], weight.shape[0]) if turned else weight.shape
    one = module(out, columns, 2, 3.0)
    return Module(one.lora_A, one.lora_B, 3.0, one.magnitude, embedding=isinstance(layer, nn.Embedding))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("sharded", [False, True])
def test_norms_from_files_are_those_of_the_model(tmp_path, make, sharded):
    """Conv1D is stored the other way round, the head is tied to the table and stands in no file."""
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    files, memory = Base(tmp_path), Base(model)
    names = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D", "Embedding")]
    assert len(names) >= 6
    assert set(names) <= set(files.paths())
    for name in names:
        one = for_layer(model.get_submodule(name))
        for with_change in (True, False):
            found = files.row_norms(name, one, with_change)
            assert torch.equal(found, memory.row_norms(name, one, with_change))
        weight = model.get_submodule(name).weight.detach().double()
        dense = weight if isinstance(model.get_submodule(name), nn.Linear) else weight.T
        expected = torch.linalg.vector_norm(dense + one.scaling * one.lora_B.double() @ one.lora_A.double(), dim=1)
        torch.testing.assert_close(files.row_norms(name, one), expected)
        expected = torch.linalg.vector_norm(dense + one.scaling * one.lora_B.double() @ one.lora_A.double(), dim=0)
        torch.testing.assert_close(files.column_norms(name, one), expected)


def test_norms_are_made_of_blocks(monkeypatch):
    model = llama()
    one = for_layer(model.model.layers[0].mlp.up_proj)
    whole = Base(model).row_norms("model.layers.0.mlp.up_proj", one)
    monkeypatch.setattr("dora_peft.adapters.formats.base.BLOCK_BYTES", 8 * 24 * 3)
    torch.testing.assert_close(Base(model).row_norms("model.layers.0.mlp.up_proj", one), whole)


def test_names_that_leave_out_the_first_parts(tmp_path):
    """Files of a base model without its head, and of one that transformers does not know."""
    tensors = {name.removeprefix("model."): t.detach().clone() for name, t in llama().named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    one = for_layer(llama().model.layers[0].mlp.up_proj)
    expected = Base(llama()).row_norms("model.layers.0.mlp.up_proj", one)
    assert torch.equal(Base(tmp_path).row_norms("model.layers.0.mlp.up_proj", one), expected)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    assert "layers.0.mlp.up_proj" in Base(tmp_path).paths()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["pipeline"]}))
    assert "layers.0.mlp.up_proj" in Base(tmp_path).paths()


@pytest.mark.parametrize("what", ["one file", "no class"])
def test_square_weights_that_are_stored_the_other_way_round(tmp_path, what):
    """c_proj of GPT-2: the config beside the file tells, or else the modules that are not square."""
    model = gpt2()
    model.save_pretrained(tmp_path)
    if what == "no class":
        (tmp_path / "config.json").unlink()
    files = Base(tmp_path / "model.safetensors")
    names = [name for name, layer in model.named_modules() if type(layer).__name__ == "Conv1D"]
    files.check(Adapter({name: for_layer(model.get_submodule(name)) for name in names}))
    name = "transformer.h.0.attn.c_proj"
    one = for_layer(model.get_submodule(name))
    assert one.in_features == one.out_features
    assert torch.equal(files.row_norms(name, one), Base(model).row_norms(name, one))


def test_paths_of_the_model_without_its_head(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    one = for_layer(model.model.layers[0].mlp.up_proj)
    base = Base(tmp_path)
    base.check(Adapter({"layers.0.mlp.up_proj": one}))
    assert torch.equal(base.row_norms("layers.0.mlp.up_proj", one), base.row_norms("model.layers.0.mlp.up_proj", one))


@pytest.mark.parametrize(
    "entries", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"vocab_size": -1}, {"hidden_act": "none such"}]
)
def test_configs_that_make_no_model(tmp_path, entries):
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **entries}))
    with pytest.raises(UnreadableError, match=r"config\.json makes no LlamaForCausalLM: .*Restore the file") as caught:
        Base(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [["a"], {"a": ["b"]}, {"a": 5}, {"a": "../model.safetensors"}, {}, None])
def test_damaged_indices(tmp_path, names):
    (tmp_path / "base").mkdir()
    llama().save_pretrained(tmp_path)
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UnreadableError, match=r"is not whole: its index names"):
        Base(tmp_path / "base")


@pytest.mark.parametrize("device", ["none", "meta", "cuda:99", ""])
def test_devices_that_there_are_not(device):
    with pytest.raises(UnreadableError, match=r"^--device "):
        Base(llama(), device)


def test_a_quantised_model_in_memory(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    root = nn.Sequential(nn.Linear(64, 32, bias=False))
    packed = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(root[0].state_dict())
    root[0] = packed.to("cpu")
    one = module(32, 64, 2, 3.0)
    found = Base(root).row_norms("0", one, with_change=False)
    dense = bitsandbytes.functional.dequantize_4bit(root[0].weight.data, root[0].weight.quant_state)
    torch.testing.assert_close(found, torch.linalg.vector_norm(dense.double(), dim=1), rtol=1e-6, atol=0)


def test_what_is_no_base(tmp_path):
    with pytest.raises(UnreadableError, match="holds no base model"):
        Base(tmp_path)
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[0].rename(tmp_path / "elsewhere")
    with pytest.raises(UnreadableError, match=rf"is not whole: its index names '{shards[0].name}'"):
        Base(tmp_path)
    shards[0].write_bytes(b"damaged")
    with pytest.raises(UnreadableError, match=f"Cannot read the base's '.*{shards[0].name}'"):
        Base(tmp_path)


def test_quantised_files_are_refused_by_name(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, key: torch.zeros(40, 24, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnreadableError, match=rf"is quantised: '{key}' is torch\.uint8"):
        Base(tmp_path).row_norms(key.removesuffix(".weight"), for_layer(model.model.layers[0].mlp.up_proj))


def test_progress_names_each_module():
    seen = []
    base = Base(llama(), progress=seen.append)
    base.row_norms("model.layers.1.mlp.up_proj", for_layer(llama().model.layers[1].mlp.up_proj))
    assert seen == ["model.layers.1.mlp.up_proj"]
