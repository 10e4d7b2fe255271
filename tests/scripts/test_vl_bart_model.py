"""VL-BART's model: pictures beside the question, generation, a pretrained BART, adapters."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
)

from dora_peft import DoraConfig
from vl_bart import data as data
from vl_bart.model import (
    VlBartConfig,
    VlBartForConditionalGeneration,
    build_vl_bart,
    random_batch,
)

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return build_vl_bart("toy").eval()


@pytest.fixture
def batch(model):
    torch.manual_seed(1)
    return random_batch(model.config, 3, 6, 4, CPU)


def test_saved_and_loaded(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    again = VlBartForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.model_type == "vl_bart"
    assert again.config.visual_dim == 12
    assert torch.equal(model(**batch).logits, again(**batch).logits)
    assert type(AutoConfig.from_pretrained(tmp_path)) is VlBartConfig
    through_auto = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert type(through_auto) is VlBartForConditionalGeneration
    assert torch.equal(model(**batch).logits, through_auto(**batch).logits)


def test_the_picture_and_its_order_matter(model, batch):
    logits = model(**batch).logits
    other = batch | {"visual_features": batch["visual_features"].flip(1)}
    assert not torch.allclose(logits, model(**other).logits)
    assert not torch.allclose(
        logits, model(**batch | {"visual_features": torch.zeros_like(other["visual_features"])}).logits
    )


def test_padding_of_the_question_does_not_matter(model, batch):
    longer = dict(batch)
    longer["input_ids"] = torch.cat([batch["input_ids"], torch.full((3, 2), model.config.pad_token_id)], 1)
    longer["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros(3, 2, dtype=torch.int64)], 1)
    torch.testing.assert_close(model(**longer).logits, model(**batch).logits)


def test_generation_writes_what_the_logits_prefer(model, batch):
    inputs = {name: batch[name] for name in ("visual_features", "input_ids", "attention_mask")}
    found = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1, forced_eos_token_id=None
    )
    logits = model(**inputs, decoder_input_ids=found[:, :-1]).logits
    logits[..., model.config.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(-1)[:, :4], found[:, 1:5])


@pytest.fixture
def bart():
    shape = {"d_model": 32, "vocab_size": 64}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 64}
    return BartForConditionalGeneration(BartConfig(**shape)).eval()


def test_around_a_pretrained_bart(bart, batch, tmp_path):
    text = {name: tensor for name, tensor in batch.items() if name != "visual_features"}
    # facebook/bart-base holds BartModel, without the output layer, which is the embedding
    for part, name in ((bart, "whole"), (bart.model, "without output layer")):
        part.save_pretrained(tmp_path / name)
        model = VlBartForConditionalGeneration.from_bart(str(tmp_path / name), 12, 36).eval()
        assert torch.equal(model(**text).logits, bart(**text).logits)
        assert model(**batch).logits.shape == bart(**text).logits.shape


def test_the_settings_of_generation_are_kept(bart, batch, tmp_path):
    expected = {"num_beams": 3, "forced_bos_token_id": 0, "no_repeat_ngram_size": 2, "early_stopping": True}
    bart.generation_config.update(**expected)
    bart.save_pretrained(tmp_path / "bart")
    model = VlBartForConditionalGeneration.from_bart(str(tmp_path / "bart"), 12, 36).eval()
    model.save_pretrained(tmp_path / "again")
    for found in (model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again").eval()):
        assert {name: getattr(found.generation_config, name) for name in expected} == expected
        inputs = {name: batch[name] for name in ("visual_features", "input_ids", "attention_mask")}
        assert (found.generate(**inputs, max_new_tokens=4)[:, 1] == 0).all()


def test_around_another_model(bart, tmp_path):
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="t5: expected a model of type 'bart', found 't5'"):
        VlBartForConditionalGeneration.from_bart(str(tmp_path / "t5"), 12, 36)
    bart.save_pretrained(tmp_path / "bart")
    weights = load_file(tmp_path / "bart/model.safetensors")
    del weights["model.encoder.layers.0.fc1.weight"]
    save_file(weights, tmp_path / "bart/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"bart: expected all weights of BART, found none for model\.encoder.*fc1"):
        VlBartForConditionalGeneration.from_bart(str(tmp_path / "bart"), 12, 36)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_adapters_on_the_attention(model, batch, targets):
    adapted = get_peft_model(model, DoraConfig(r=2, target_modules=targets))
    adapted(**batch).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    # of the encoder's, the decoder's and the cross attention
    assert sum("lora_B" in name for name in gradients) == 3 * len(targets)
    assert all(g is not None and g.abs().sum() > 0 for name, g in gradients.items() if "lora_A" not in name)


def test_features_of_another_width(model, batch):
    with pytest.raises(ValueError, match=r"at most 36 tokens of 12 features, found the shape \[3, 36, 13\]"):
        model(**batch | {"visual_features": torch.zeros(3, 36, 13)})
    with pytest.raises(ValueError, match="expected input_ids"):
        model(visual_features=batch["visual_features"])
