"""Text loss and KL of a model with an exported LoRA against the adapted one."""

import pytest
import torch
from format_fixtures import llama
from lowrank_fixtures import adapted, updates_of
from peft import PeftModel
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from dora_peft.adapters.export.comparison import applied, compare
from dora_peft.adapters.export.lora import export_lora
from dora_peft.adapters.formats import UnreadableError


def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 32, (1, length), generator=generator) for length in (30, 200)]


def exported(model, folder, rank=32):
    return export_lora(updates_of(model), folder, base_name="x", rank=rank, dtype=torch.float32)


def test_hooks_compute_what_peft_does_of_the_folder(tmp_path):
    model = adapted(target_modules=["embed_tokens", "q_proj", "down_proj"])
    result = exported(model, tmp_path / "lora", rank=1)
    (ids, _) = batches()
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    with torch.no_grad():
        expected, before = loaded(ids).logits, llama().eval()(ids).logits
        with model.disable_adapter(), applied(model, result.factors):
            found = model(ids).logits
    assert (found - expected).abs().max() < 1e-4 * (expected - before).abs().max()
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_an_embedding_that_multiplies_its_vectors_multiplies_its_adapters(tmp_path):
    def gemma():
        torch.manual_seed(0)
        return Gemma3ForCausalLM(
            Gemma3TextConfig(
                hidden_size=24, intermediate_size=40, num_hidden_layers=1, vocab_size=32, head_dim=12,
                num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=0,
            )
        ).eval()  # fmt: skip

    model = adapted(gemma(), target_modules=["embed_tokens"])
    result = exported(model, tmp_path / "lora", rank=1)
    loaded = PeftModel.from_pretrained(gemma(), tmp_path / "lora").eval()
    (ids, _) = batches()
    with torch.no_grad(), model.disable_adapter(), applied(model, result.factors):
        assert torch.allclose(model(ids).logits, loaded(ids).logits, atol=1e-5)


def test_losses_and_kl_are_those_of_the_three_models(tmp_path):
    model = adapted()
    result = exported(model, tmp_path / "lora", rank=1)
    report = compare(model, result.factors, batches())
    loaded, base = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval(), llama().eval()
    losses, kls, tokens = [0.0] * 3, [0.0] * 3, 0
    with torch.no_grad():
        for ids in batches():
            logs = [F.log_softmax(one(ids).logits[0, :-1].double(), -1) for one in (model, loaded, base)]
            tokens += ids.shape[1] - 1
            for number, log in enumerate(logs):
                losses[number] += float(F.nll_loss(log, ids[0, 1:], reduction="sum"))
                kls[number] += float((logs[0].exp() * (logs[0] - log)).sum())
    assert report.tokens == tokens
    found = (report.adapted_loss, report.exported_loss, report.base_loss)
    assert found == pytest.approx([loss / tokens for loss in losses], rel=1e-5)
    assert (report.exported_kl, report.base_kl) == pytest.approx([kl / tokens for kl in kls[1:]], rel=1e-2)


def test_more_rank_is_nearer_and_all_of_it_is_there(tmp_path):
    model = adapted()
    reports = [compare(model, exported(model, tmp_path / str(r), r).factors, batches()) for r in (1, 8, 32)]
    low, middle, full = (report.exported_kl for report in reports)
    assert full < 0.2 * middle < middle < low < reports[0].base_kl
    assert reports[2].exported_loss == pytest.approx(reports[2].adapted_loss, abs=1e-5)


def test_a_model_in_16_bits_is_compared_in_its_dtype(tmp_path):
    model = adapted()
    result = exported(model, tmp_path / "lora")
    report = compare(model.to(torch.bfloat16), result.factors, batches())
    assert report.exported_kl < 0.2 * report.base_kl


def test_what_cannot_be_compared_is_refused(tmp_path):
    model = adapted()
    result = exported(model, tmp_path / "lora")
    with pytest.raises(UnreadableError, match="Expected a PeftModel"):
        compare(llama(), result.factors, batches())
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(torch.nan)
    with pytest.raises(UnreadableError, match="expected finite ones"):
        compare(model, result.factors, batches())
