"""The scripts that measure exports run in short, and their tables say what was stored."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from export_fixtures import wide_llama
from format_fixtures import saved
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield lambda name: importlib.import_module(name)
    for name in list(sys.modules):
        if name in ("export_accuracy", "export_codes"):
            del sys.modules[name]


@pytest.fixture
def folders(tmp_path):
    """A base with a tokenizer of letters, an adapter, and four words."""
    wide_llama().save_pretrained(tmp_path / "base")
    letters = {letter: number for number, letter in enumerate("?abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="?").save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", wide_llama(), target_modules=["q_proj", "up_proj"])
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"prompt": f"{a} b c d", "completion": " e f"}) for a in "abcd"]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(lines))
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines * 20))
    return tmp_path


def test_accuracy(folders, script, monkeypatch, capsys):
    accuracy = script("export_accuracy")
    kept = [accuracy.Case("exact", "fp32"), accuracy.Case("merged", "bf16"), accuracy.Case("lora", "fp16", 32, True)]
    assert set(kept) <= set(accuracy.cases())
    monkeypatch.setattr(accuracy, "cases", lambda: iter(kept))
    words = ["--base", folders / "base", "--adapter", folders / "adapter", "--dataset", folders / "data"]
    accuracy.main([*map(str, words), "--results", str(folders / "results")])
    rows = json.loads((folders / "results" / "spelling.json").read_text())["rows"]
    assert [row["route"] for row in rows] == ["dora", "exact", "merged", "lora"]
    # an exact export in fp32 answers as the model does
    assert rows[1]["same_answers"] == 1
    assert rows[3]["totals"]["exported_kl"] >= 0
    said = capsys.readouterr().out
    assert "| `lora --rank 32 --calibration` | fp16 |" in said
    assert "| the DoRA model itself | fp32 |" in said


def test_codes(folders, script, monkeypatch):
    pytest.importorskip("bitsandbytes")
    codes = script("export_codes")
    monkeypatch.setattr(codes, "FORMATS", ("nf4",))
    words = ["--base", folders / "base", "--adapter", folders / "adapter", "--results", folders / "results"]
    codes.main(list(map(str, words)))
    half, narrow = json.loads((folders / "results" / "codes.json").read_text())["rows"]
    assert (half["dtype"], narrow["dtype"]) == ("float16", "bfloat16")
    assert half["in_scales"] < 0.5 * half["quantised_again"]
