"""llama.cpp's file: names, the order of rows, what is said in its head, and what it has no place for."""

import sys
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from format_fixtures import llama
from lowrank_fixtures import adapted, updates_of
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor, get_gguf_hf_weights_map

from dora_peft.adapters.export.gguf import ARCHITECTURES, llama_cpp_tensors, write_gguf
from dora_peft.adapters.export.lora import export_lora
from dora_peft.adapters.formats import Module, UnreadableError

LAYER = "model.layers.1"
PATHS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
HEADS = {"q_proj": 4, "k_proj": 2}
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}


def config_of(kind="llama", **options):
    return {"model_type": kind, **SHAPE, **options}


def modules(*paths, dtype=torch.float32, rank=3):
    found = {path: Module(torch.randn(rank, 16), torch.randn(16, rank), float(rank)) for path in paths}
    return {
        path: Module(own.lora_A.to(dtype), own.lora_B.to(dtype), own.alpha, embedding="embed" in path)
        for path, own in found.items()
    }


def of_layer():
    return modules(*(f"{LAYER}.{path}" for path in PATHS), "lm_head", "model.embed_tokens")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_names_are_those_that_transformers_reads(kind):
    own = of_layer()
    config = CONFIG_MAPPING[kind](**SHAPE, hidden_size=16, intermediate_size=16, vocab_size=16, head_dim=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # of Mistral's files, which say that they are LLaMA's
    names = get_gguf_hf_weights_map(model, LlamaTensorProcessor(config={}), ARCHITECTURES[kind].name)
    found = llama_cpp_tensors(own, config_of(kind))
    paths = {names[key.removesuffix(".lora_a")] for key in found if key.endswith(".lora_a")}
    assert paths == {f"{path}.weight" for path in own}
    assert len(found) == 2 * len(own)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_of_q_and_k_are_in_the_order_of_the_models_files(kind):
    names = {"qkv_proj": "attn_qkv"} if kind == "phi3" else ATTENTION
    own = modules(*(f"{LAYER}.self_attn.{name}" for name in names))
    found = llama_cpp_tensors(own, config_of(kind))
    turned = 0
    for module, (name, theirs) in zip(own.values(), names.items(), strict=True):
        A, B = (found[f"blk.1.{theirs}.weight.lora_{half}"] for half in "ab")
        assert torch.equal(A, module.lora_A)
        if not ARCHITECTURES[kind].rotated or name not in HEADS:
            assert torch.equal(B, module.lora_B)
            continue
        back = LlamaTensorProcessor(config={})._reverse_permute_weights(B.numpy(), HEADS[name], HEADS[name])
        assert np.array_equal(back, module.lora_B.numpy())
        # pairs of the two halves of a head become neighbours
        assert torch.equal(B[1], module.lora_B[len(B) // HEADS[name] // 2])
        turned += 1
    assert turned == (2 if ARCHITECTURES[kind].rotated else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_file_says_what_llama_cpp_asks_for(tmp_path, dtype):
    own = modules(f"{LAYER}.mlp.down_proj", "model.embed_tokens", dtype=dtype)
    path = write_gguf(own, config_of("qwen2"), tmp_path / "new" / "x.gguf", name="some base")
    reader = gguf.GGUFReader(path)
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert said == {
        "general.architecture": "qwen2", "general.type": "adapter", "general.name": "some base",
        "adapter.type": "lora", "adapter.lora.alpha": 3.0,
    }  # fmt: skip
    found = {}
    for tensor in reader.tensors:
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(wide)).to(dtype)
    down, table = own.values()
    assert torch.equal(found["blk.1.ffn_down.weight.lora_a"], down.lora_A)
    assert torch.equal(found["blk.1.ffn_down.weight.lora_b"], down.lora_B)
    # rows of A are looked up by token
    assert torch.equal(found["token_embd.weight.lora_a"], table.lora_A.T)
    assert torch.equal(found["token_embd.weight.lora_b"], table.lora_B)
    assert len(found) == 4
    assert [entry.name for entry in path.parent.iterdir()] == ["x.gguf"]


def test_the_route_writes_it(tmp_path):
    model = adapted(target_modules=["q_proj", "down_proj"])
    changes = updates_of(model)
    config = {**llama().config.to_dict(), "model_type": "llama"}
    result = export_lora(
        changes, tmp_path / "x.gguf", base_name="a/base", rank=8, to="gguf", config=config, dtype=torch.float32
    )
    reader = gguf.GGUFReader(result.files[0])
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert len(tensors) == 2 * len(changes)
    own = result.factors["model.layers.1.mlp.down_proj"]
    product = tensors["blk.1.ffn_down.weight.lora_b"] @ tensors["blk.1.ffn_down.weight.lora_a"]
    assert torch.allclose(product, own.lora_B @ own.lora_A, rtol=1e-5, atol=1e-7)
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
def test_a_tied_head_is_refused(path):
    with pytest.raises(UnreadableError, match=f"tied embedding and head.*'{path}'"):
        llama_cpp_tensors(modules(path), config_of(tie_word_embeddings=True))
    llama_cpp_tensors(modules(path), config_of())


def test_what_a_config_leaves_out_is_as_its_class_has_it():
    with pytest.raises(UnreadableError, match="tied"):
        llama_cpp_tensors(modules("model.embed_tokens"), {"model_type": "gemma"})
    # 32 heads, and as many of k
    own = {f"{LAYER}.self_attn.k_proj": Module(torch.randn(1, 8), torch.randn(128, 1), 1.0)}
    (turned,) = [t for name, t in llama_cpp_tensors(own, {"model_type": "llama"}).items() if name.endswith("_b")]
    assert torch.equal(turned[1], own[f"{LAYER}.self_attn.k_proj"].lora_B[2])


@pytest.mark.parametrize(
    ("own", "config", "words"),
    [
        (
            modules("model.layers.0.mlp.other"),
            config_of(),
            "no place for an adapter of module 'model.layers.0.mlp.other'",
        ),
        (modules("model.layers.2.mlp.up_proj"), config_of(), "no place"),
        (modules("model.embed_tokens"), config_of("gemma3_text"), "no place"),
        (
            {f"{LAYER}.mlp.up_proj": Module(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 1, 1), 1.0)},
            config_of(),
            "no place",
        ),
        (modules("lm_head"), config_of("bert"), "model_type is 'bert'"),
        (modules("lm_head"), {}, "model_type is 'None'"),
        (modules(f"{LAYER}.self_attn.q_proj"), config_of(num_attention_heads=3), "config.json is damaged: .*heads"),
        (
            {f"{LAYER}.self_attn.q_proj": Module(torch.ones(1, 2), torch.ones(18, 1), 1.0)},
            config_of(),
            "18 rows: expected",
        ),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(own, config, words, tmp_path):
    with pytest.raises(UnreadableError, match=words):
        write_gguf(own, config, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_if_asked(tmp_path):
    own, path = modules("lm_head"), tmp_path / "x.gguf"
    write_gguf(own, config_of(), path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="--force"):
        write_gguf(modules("lm_head"), config_of(), path)
    assert path.read_bytes() == before
    path.write_text("my notes")
    with pytest.raises(FileExistsError, match="is no GGUF file"):
        write_gguf(modules("lm_head"), config_of(), path, force=True)
    assert path.read_text() == "my notes"
    path.write_bytes(b"GGUF, an earlier one")
    write_gguf(modules("lm_head"), config_of(), path, force=True)
    assert path.read_bytes() != before
    with pytest.raises(ValueError, match=r"ends in \.gguf"):
        write_gguf(own, config_of(), tmp_path / "x.bin")
    with pytest.raises(ValueError, match="is no folder"):
        write_gguf(own, config_of(), path / "y.gguf")
    (tmp_path / "z.gguf").mkdir()
    with pytest.raises(FileExistsError, match="is no file"):
        write_gguf(own, config_of(), tmp_path / "z.gguf", force=True)


def test_without_the_package_the_mend_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnreadableError, match="pip install gguf"):
        write_gguf(modules("lm_head"), config_of(), tmp_path / "x.gguf")
    old = SimpleNamespace(MODEL_ARCH_NAMES={})
    monkeypatch.setitem(sys.modules, "gguf", old)
    with pytest.raises(UnreadableError, match=r"does not know llama\.cpp's llama"):
        llama_cpp_tensors(modules("lm_head"), config_of())
