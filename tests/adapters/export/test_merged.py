"""Merged into files as merge_and_unload merges into a loaded model, bit for bit."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from export_fixtures import gpt2, qwen, wide_llama
from format_fixtures import llama, saved
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from dora_peft.adapters.export.adapted import AdaptedBase
from dora_peft.adapters.export.merged import export_merged
from dora_peft.adapters.formats import Checkpoint, UnreadableError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Merging unties", "ignore:Input and output embeddings",
    "ignore:Setting `save_embedding_layers`", "ignore:Already following adapters were merged",
    "ignore:Could not find a config file in  - will assume",
)  # fmt: skip
ROOT = Path(__file__).parents[3]
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
EIGHT = {"load_in_8bit": True}


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, vocab_size=32, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def tied():
    return qwen(tied=True)


CASES = {
    "llama": (llama, {}),
    "qwen": (qwen, {}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2-table": (gpt2, {"target_modules": ["c_attn", "wte"]}),
    "mixtral": (mixtral, {"target_modules": ["q_proj", "o_proj"]}),
    "tied-head": (tied, {"target_modules": ["lm_head", "q_proj"]}),
    "tied-table": (tied, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-both": (tied, {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied-saved": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied-tokens": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}),
    "table": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}),
    "bias-all": (qwen, {"bias": "all"}),
    "bias-lora": (qwen, {"bias": "lora_only", "target_modules": ["q_proj"]}),
    "rslora": (llama, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}),
    "magnitudes": (llama, {"target_modules": ["q_proj"], "magnitude_only_modules": ["up_proj"]}),
}
UNTIED = ("gpt2-table", "tied-head", "tied-table", "tied-both", "tied-saved")


def tensors_in(folder):
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def merged_in_memory(folder, base, adapters, dtype):
    """What merge_and_unload and save_pretrained write."""
    model = PeftModel.from_pretrained(base.from_pretrained(folder / "base", dtype=dtype), adapters[0])
    for number, adapter in enumerate(adapters[1:]):
        model.load_adapter(adapter, str(number))
    model.base_model.set_adapter(["default", *map(str, range(len(adapters) - 1))])
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "expected")
    return merged.eval()


def export(folder, adapters, **options):
    return export_merged(AdaptedBase(Checkpoint(folder / "base"), adapters), folder / "out", **options)


@pytest.mark.parametrize(
    ("what", "dtype"),
    [(what, torch.bfloat16) for what in CASES]
    + [
        (what, dtype)
        for what in ("llama", "gpt2-table", "tied-both", "bias-all")
        for dtype in (torch.float32, torch.float16)
    ],
)
def test_the_files_are_those_of_merge_and_unload(tmp_path, what, dtype):
    make, options = CASES[what]
    base = make().to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="3KB")
    adapters = [saved(tmp_path / "adapter", make().to(dtype), **options)]
    expected = merged_in_memory(tmp_path, type(base), adapters, dtype)
    before = tensors_in(tmp_path / "base")
    done = export(tmp_path, adapters)
    found = tensors_in(tmp_path / "out")
    check_equal(found, tensors_in(tmp_path / "expected"))
    assert any(key not in before or not torch.equal(found[key], before[key]) for key in found)
    assert len(Checkpoint(tmp_path / "base").files()) > 1
    assert Checkpoint(tmp_path / "out").files() == Checkpoint(tmp_path / "base").files()
    # the files hold two tables where one was adapted, and the config does not tie them again
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert bool(done.notes) == (what in UNTIED)
    if what in UNTIED:
        assert config["tie_word_embeddings"] is False
    loaded = type(base).from_pretrained(tmp_path / "out", dtype=dtype).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("what", ["qwen", "bias-all", "tied-tokens", "tied-saved"])
def test_another_dtype_is_that_of_a_model_loaded_in_it(tmp_path, what, stored, dtype):
    make, options = CASES[what]
    base = make().to(stored)
    base.save_pretrained(tmp_path / "base")
    adapters = [saved(tmp_path / "adapter", make().to(stored), **options)]
    merged_in_memory(tmp_path, type(base), adapters, dtype)
    export(tmp_path, adapters, dtype=dtype)
    check_equal(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "expected"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_several_adapters_in_their_order(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    adapters = [saved(tmp_path / "a"), saved(tmp_path / "b", r=2, target_modules=["q_proj", "up_proj"])]
    merged_in_memory(tmp_path, type(llama()), adapters, torch.float32)
    export(tmp_path, adapters)
    found = tensors_in(tmp_path / "out")
    check_equal(found, tensors_in(tmp_path / "expected"))
    export(tmp_path, adapters[::-1], force=True)
    turned = tensors_in(tmp_path / "out")
    key = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(turned[key], found[key])


def test_nothing_of_a_module_stays_in_memory_when_it_is_written(tmp_path):
    """Neither weights nor records of their norms, between which the heap would grow by all of the model."""
    llama().save_pretrained(tmp_path / "base")
    adapted = AdaptedBase(Checkpoint(tmp_path / "base"), [saved(tmp_path / "adapter")])
    stored, seen = adapted.stored, []

    def watched(path):
        weight = stored(path)
        seen.append(weakref.ref(weight.untyped_storage()))
        return weight

    def check(key):
        known = [path for path, layer in adapted.layers.items() if layer._base_norm is not None]
        known += [path for path, layer in adapted.layers.items() for norm in layer._norms.values() if norm.known]
        assert known == [], key
        assert all(layer.get_base_layer().weight.is_meta for layer in adapted.layers.values())

    adapted.stored = watched
    export_merged(adapted, tmp_path / "out", progress=check)
    assert len(seen) == len(adapted.layers)
    assert not any(one() for one in seen)


def test_mixtrals_own_names_are_kept(tmp_path):
    mixtral().save_pretrained(tmp_path / "base")
    export(tmp_path, [saved(tmp_path / "adapter", mixtral(), target_modules=["q_proj"])])
    found = tensors_in(tmp_path / "out")
    assert found.keys() == tensors_in(tmp_path / "base").keys()
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in found


def test_a_module_that_cannot_be_merged_or_found_is_named_before_a_byte_is_written(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    adapter = saved(tmp_path / "adapter")
    adapted = AdaptedBase(Checkpoint(tmp_path / "base"), [adapter])
    wanted = "model.layers.1.mlp.up_proj"
    # as in a folder of which one file was not downloaded, and its index mended by hand
    del adapted.names._groups[f"{wanted}.weight"]
    with pytest.raises(UnreadableError, match=r"have no 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        export_merged(adapted, tmp_path / "out")
    adapted = AdaptedBase(Checkpoint(tmp_path / "base"), [adapter])
    adapted.model.base_model.model.another = adapted.layers[wanted].get_base_layer()
    with pytest.raises(UnreadableError, match=r"not supported for module 'model\.layers\.1\.mlp\.up_proj'"):
        export_merged(adapted, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_that_gives_no_finite_weight_leaves_no_model(tmp_path):
    """The head of the files is whole, and W' is made when its file is written."""
    llama().save_pretrained(tmp_path / "base")
    adapted = AdaptedBase(Checkpoint(tmp_path / "base"), [saved(tmp_path / "adapter")])
    path = "model.layers.1.mlp.up_proj"
    adapted.layers[path].magnitude("default").data[0] = torch.inf
    with pytest.raises(UnreadableError, match=path):
        export_merged(adapted, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("change", ["adapter", "order", "dtype"])
def test_going_on_with_another_adapter_is_refused(tmp_path, change):
    llama().save_pretrained(tmp_path / "base", max_shard_size="3KB")
    adapters = [saved(tmp_path / "a"), saved(tmp_path / "b", r=2)]
    keys = []

    def stop(key):
        keys.append(key)
        if len(keys) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path, adapters, progress=stop)
    other = {"adapter": [adapters[0], saved(tmp_path / "c", r=3)], "order": adapters[::-1]}.get(change, adapters)
    dtype = torch.float16 if change == "dtype" else None
    with pytest.raises(FileExistsError, match=rf"begun with another option {change if dtype else 'adapter'}"):
        export(tmp_path, other, dtype=dtype)
    keys.clear()
    export(tmp_path, adapters, progress=keys.append)
    assert 0 < len(keys) < len(Checkpoint(tmp_path / "base").entries)


KILLED = """
import os, signal, sys
from dora_peft.adapters.export.adapted import AdaptedBase
from dora_peft.adapters.export.merged import export_merged
from dora_peft.adapters.formats import Checkpoint
folder, at = sys.argv[1], int(sys.argv[2])

def count(key, keys=[]):
    keys.append(key)
    if len(keys) == at:
        os.kill(os.getpid(), signal.SIGKILL)

export_merged(AdaptedBase(Checkpoint(f"{folder}/base"), [f"{folder}/adapter"]), f"{folder}/out", progress=count)
"""


def test_killed_in_the_middle_and_gone_on_the_bytes_are_those_of_one_run(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base", max_shard_size="3KB")
    adapters = [saved(tmp_path / "adapter")]
    adapted = AdaptedBase(Checkpoint(tmp_path / "base"), adapters)
    export_merged(adapted, tmp_path / "whole")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), "13"]
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert died.returncode == -9, died.stderr
    assert not (tmp_path / "out").exists()
    assert any((tmp_path / "out.partial").glob("*.safetensors"))
    keys = []
    export_merged(adapted, tmp_path / "out", progress=keys.append)
    assert len(keys) < len(adapted.checkpoint.entries) - 5
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:Merge")
@pytest.mark.parametrize(
    ("options", "dtype"),
    # bitsandbytes gives bytes as fp32, which a model in 16 bits would round before it is merged
    [(FOUR, torch.bfloat16), (FOUR, torch.float16), (FOUR, torch.float32), (EIGHT, torch.float32)],
)
def test_a_quantised_base_is_merged_as_if_it_had_been_dequantised(tmp_path, options, dtype):
    """Also the modules that no adapter changes; the files say of no quantisation any more."""
    pytest.importorskip("bitsandbytes")
    wide_llama().save_pretrained(tmp_path / "floats")

    def quantised():
        config = BitsAndBytesConfig(**options)
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "floats", quantization_config=config, dtype=dtype, device_map="cpu"
        )

    quantised().save_pretrained(tmp_path / "base", max_shard_size="100KB")
    adapters = [saved(tmp_path / "adapter", quantised(), target_modules=["q_proj", "down_proj"])]
    dense = quantised().dequantize().to(dtype)
    expected = PeftModel.from_pretrained(dense, adapters[0]).merge_and_unload().state_dict()
    export(tmp_path, adapters)
    check_equal(tensors_in(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")
