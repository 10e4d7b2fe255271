"""The model that a text goes through is the adapted one, also over a base that was quantised in training."""

import pytest
import torch
from format_fixtures import llama, logits, saved
from gguf_fixtures import llama as wide
from gguf_fixtures import loaded, save_gguf, trained
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dora_peft.adapters.export import export
from dora_peft.adapters.export.adapted import AdaptedBase
from dora_peft.adapters.export.calibration import tokenizer_of
from dora_peft.adapters.export.gguf_checkpoint import checkpoint_of
from dora_peft.adapters.export.text import text_for
from dora_peft.adapters.formats import Checkpoint, UnreadableError

WORDS = [f"w{number}" for number in range(32)]


@pytest.fixture
def folders(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS[:10]) for _ in range(30)), encoding="utf-8")
    return tmp_path


def opened(folders, **options):
    return AdaptedBase(Checkpoint(folders / "base"), [folders / "adapter"], **options)


def test_the_model_is_the_adapted_one(folders):
    text = text_for(opened(folders), folders / "text.txt")
    assert [ids.tolist() for ids in text.batches] == [[list(range(10))] * 30]
    with torch.no_grad():
        found = text.model(torch.arange(10)[None]).logits
    torch.testing.assert_close(found, logits(folders / "adapter"))


def test_a_gguf_brings_its_model_and_tokenizer(folders, monkeypatch):
    path = save_gguf(wide(), folders / "model.gguf")
    trained(path, folders / "over")
    asked = {}

    def tokenizer(folder, **options):
        asked[folder] = options
        return tokenizer_of(str(folders / "base"))

    monkeypatch.setattr("dora_peft.adapters.export.text.tokenizer_of", tokenizer)
    text = text_for(AdaptedBase(checkpoint_of(path), [folders / "over"]), folders / "text.txt")
    assert asked == {str(folders): {"gguf_file": "model.gguf"}}
    with torch.no_grad():
        found = text.model(torch.arange(10)[None]).logits
    torch.testing.assert_close(found, logits(folders / "over", loaded(path)))


def test_it_is_quantised_as_in_training(folders):
    pytest.importorskip("bitsandbytes")
    adapted = opened(folders, base_quantization="nf4")
    text = text_for(adapted, folders / "text.txt")
    path = "model.layers.0.mlp.up_proj"
    layer = text.model.base_model.model.get_submodule(path)
    assert torch.equal(layer.get_base_layer().weight, adapted.stored(path))
    assert not torch.equal(layer.get_base_layer().weight, llama().get_submodule(path).weight)


@pytest.mark.parametrize("covariance", [False, True])
def test_an_export_says_what_the_text_says(folders, covariance):
    """A fit by the text's inputs leaves less of the KL than one without, and the rank that holds all none."""
    told = {}
    for rank, text in ((1, None), (1, folders / "text.txt"), (64, folders / "text.txt")):
        record = export(
            folders / "adapter", folders / "base", folders / "out", "lora", rank=rank, dtype=torch.float32, force=True,
            calibration=text, covariance=covariance and text is not None,
        )  # fmt: skip
        told[rank, text is not None] = record.totals
    assert "exported_kl" not in told[1, False]
    weighted, whole = told[1, True], told[64, True]
    assert weighted["error_over_update"] > told[1, False]["error_over_update"]
    assert 0 < weighted["exported_kl"] < weighted["base_kl"]
    assert whole["exported_kl"] < 1e-6
    assert whole["exported_loss"] == pytest.approx(whole["adapted_loss"], abs=1e-5)
    assert whole["adapted_loss"] != pytest.approx(whole["base_loss"], abs=1e-5)


def test_bad_texts_and_models(folders):
    with pytest.raises(UnreadableError, match=r"--calibration .*no-such"):
        text_for(opened(folders), folders / "no-such")
    (folders / "empty.txt").write_text(" \n")
    with pytest.raises(UnreadableError, match="is empty"):
        text_for(opened(folders), folders / "empty.txt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folders / "base" / name).unlink()
    with pytest.raises(UnreadableError, match="needs the tokenizer"):
        text_for(opened(folders), folders / "text.txt")
