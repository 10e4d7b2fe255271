"""The tuner against PEFT's `LoraConfig(use_dora=True)` over bitsandbytes' weights."""

import pytest
import torch
from parity_fixtures import loss_of, outputs, same_tensors, trainable
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from dora_peft import DoraConfig


def quantised_llama(folder, bits, nested=False):
    """A tiny Llama loaded by transformers with 4-bit or 8-bit weights, on the CPU."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
        max_position_embeddings=32,
    )
    if not (folder / "config.json").exists():
        LlamaForCausalLM(config).save_pretrained(folder)
    if bits == 4:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=torch.float32,
        )
    else:
        quantisation = BitsAndBytesConfig(load_in_8bit=True)
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, device_map={"": "cpu"}, dtype=torch.float32
    )


QUANTISED = [(4, False), (4, True), (8, False)]


# PEFT up to 0.21.2 calls the old name, which transformers 5.23 renamed
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(("bits", "nested"), QUANTISED)
def test_training_a_quantised_model(bits, nested, tmp_path):
    model = prepare_model_for_kbit_training(
        quantised_llama(tmp_path / "base", bits, nested), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(model, DoraConfig(r=4, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, "llama")
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model).values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(".lora_" in name for name in trainable(model))

    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    loaded = PeftModel.from_pretrained(quantised_llama(tmp_path / "base", bits, nested), tmp_path / "adapter").eval()
    assert isinstance(loaded.peft_config["default"], DoraConfig)
    with torch.no_grad():
        torch.testing.assert_close(outputs(loaded, "llama"), outputs(model, "llama"))


@pytest.mark.parametrize(("bits", "nested"), QUANTISED)
def test_a_quantised_model_equals_its_dequantised_self(bits, nested, tmp_path):
    quantised = quantised_llama(tmp_path / "base", bits, nested)
    dense = quantised_llama(tmp_path / "base", bits, nested).dequantize().float()
    models = []
    for base in (quantised, dense):
        torch.manual_seed(1)
        model = get_peft_model(base, DoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        models.append(model.train())
    same_tensors(trainable(models[0]), trainable(models[1]), rtol=1e-3, atol=1e-3)
    # int8 products quantise their input as well
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if bits == 4 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(outputs(models[0], "llama"), outputs(models[1], "llama"), **tolerance)


@pytest.mark.parametrize(("bits", "nested"), QUANTISED)
def test_merging_a_quantised_model(bits, nested, tmp_path):
    base = quantised_llama(tmp_path / "base", bits, nested)
    model = get_peft_model(base, DoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    before = outputs(model, "llama").detach()
    model.merge_adapter()
    merged = outputs(model, "llama").detach()
    # the merged weights are quantised again
    assert (merged - before).norm() < (0.5 if bits == 4 else 0.1) * before.norm()
    with model.disable_adapter():
        assert (outputs(model, "llama") - before).norm() > (merged - before).norm()
    model.unmerge_adapter()
    assert torch.equal(outputs(model, "llama"), before)
