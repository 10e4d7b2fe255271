"""Which format a module's tensors are in; real checkpoints, saved and loaded by transformers."""

import json
import shutil

import pytest
import torch
from codes_fixtures import PATH, held, some_c
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from dora_peft.adapters.export.codes import codes_of, quantised_paths
from dora_peft.adapters.formats import Checkpoint, UnreadableError


def test_floats_and_what_is_not_there_have_no_codes():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert codes_of(held({"weight": torch.ones(2, 2, dtype=dtype), "bias": torch.ones(2)}), PATH) is None
    checkpoint = held({"weight": torch.ones(2), "num_batches_tracked": torch.tensor(1)}, quant_method="gptq")
    assert codes_of(checkpoint, PATH) is None
    assert codes_of(checkpoint, "model.layers.0") is None
    assert codes_of(checkpoint, "model.layers.7") is None
    assert quantised_paths(checkpoint) == []


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.ones(2, 2, dtype=torch.int8)},
        {"weight._data": torch.ones(2, 2, dtype=torch.int8), "weight._scale": torch.ones(2, 1)},
        {"weight:_data": torch.ones(2, 2, dtype=torch.int8)},
        {"gate_up_proj_blocks": torch.ones(2, 2, dtype=torch.uint8), "gate_up_proj_scales": torch.ones(2, 2)},
        {"W_q": torch.ones(2, 2, dtype=torch.uint8)},
    ],
)
def test_other_quantisations_are_named_not_taken_for_floats(tensors):
    with pytest.raises(UnreadableError, match=rf"'base', module '{PATH}'"):
        codes_of(held(tensors, quant_method="other"), PATH)


def quantised(folder, **options):
    """A tiny LLaMA, quantised and saved by transformers."""
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "plain")
    quantisation = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=quantisation, device_map="cpu")
    model.save_pretrained(folder / "quantised")
    return model


FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def dense(model):
    """W0 of the quantised modules by path, as transformers dequantises them."""
    library = pytest.importorskip("transformers.integrations.bitsandbytes")
    linear = {name: one for name, one in model.named_modules() if type(one).__name__ in ("Linear4bit", "Linear8bitLt")}
    assert len(linear) == 7
    return {
        name: library.dequantize_bnb_weight(one.weight, getattr(one, "state", None)).detach().clone()
        for name, one in linear.items()
    }


@pytest.mark.parametrize(
    "options",
    [FOUR, {**FOUR, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}],
    ids=["nf4", "nested", "int8"],
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_rows_times_c(tmp_path, options):
    before = dense(quantised(tmp_path, **options))
    checkpoint = Checkpoint(tmp_path / "quantised")
    assert sorted(quantised_paths(checkpoint)) == sorted(before)
    tensors = load_file(tmp_path / "quantised" / "model.safetensors")
    scales = {}
    for path, weight in before.items():
        codes = codes_of(checkpoint, path)
        assert torch.equal(codes.dequantise(0, codes.out_features), weight)
        scales[path] = some_c(codes.out_features, sign=True)
        new = codes.times(scales[path])
        for key in codes.keys:
            del tensors[key]
        tensors |= new
    assert codes_of(checkpoint, "model.embed_tokens") is None
    shutil.copytree(tmp_path / "quantised", tmp_path / "new")
    save_file(tensors, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", device_map="cpu", dtype=torch.float32)
    after = dense(loaded)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    for path, c in scales.items():
        expected = c[:, None] * before[path].double()
        assert (after[path].double() - expected).norm() < 3e-3 * expected.norm(), path
        plain.get_submodule(path).weight.data = expected.float()
    tokens = torch.arange(8)[None]
    found, expected = loaded(tokens).logits, plain(tokens).logits
    # int8 quantises activations
    assert (found - expected).norm() < (0.05 if "load_in_8bit" in options else 0.01) * expected.norm()


def test_a_config_of_older_names_and_a_real_file(tmp_path):
    tensors = {f"{PATH}.weight_packed": torch.zeros(4, 8, dtype=torch.int32),
               f"{PATH}.weight_scale": torch.ones(4, 1), f"{PATH}.weight_shape": torch.tensor([4, 64])}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    codes = codes_of(Checkpoint(tmp_path), PATH)
    assert (codes.out_features, codes.in_features) == (4, 64)
    assert torch.equal(codes.dequantise(1, 3), torch.full((2, 64), -8.0))
