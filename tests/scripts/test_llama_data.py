"""Files to batches: formats, cutting, packing, held-out records, and errors that name file, line and record."""

import csv
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from finetune_fixtures import make_llama, make_tokenizer, make_words, write_jsonl
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.arguments import DataArguments
from finetune.data import AnswerCollator, load_datasets, load_records, pack_records
from finetune.encoding import IGNORE

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = "tiny"
    return tokenizer


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **values: Any) -> tuple[Any, Any]:
    return load_datasets(DataArguments(dataset=str(path), **values), tokenizer, seed=42)


def answer(tokenizer: PreTrainedTokenizerFast, row: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORE])


@pytest.mark.parametrize("suffix", ["csv", "parquet", "folder"])
def test_other_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, suffix: str) -> None:
    records = make_words(3)
    if suffix == "csv":
        path = tmp_path / "a.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(records)
    elif suffix == "parquet":
        path = tmp_path / "a.parquet"
        datasets.Dataset.from_list(records).to_parquet(path)
    else:
        path = tmp_path / "folder"
        path.mkdir()
        write_jsonl(path / "train.jsonl", records)
    train, _ = load(path, tokenizer)
    assert [answer(tokenizer, row) for row in train] == [f"{record['completion']}<|im_end|>" for record in records]


def test_long_records_are_cut_or_dropped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"prompt": "a" * 4, "completion": "b" * 2},
        {"prompt": "a" * 4, "completion": "b" * 20},
        {"prompt": "a" * 20, "completion": "b"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    train, _ = load(path, tokenizer, max_length=8)
    assert [len(row["input_ids"]) for row in train] == [7, 8]
    out = " ".join(capsys.readouterr().out.split())
    assert "2 of 3 records are longer than max_length 8 and were cut, 1 of them had no answer left" in out


def test_eval_size_holds_records_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_words(10))
    train, evaluation = load(path, tokenizer, eval_size=3, max_train_samples=5, max_eval_samples=2)
    assert (len(train), len(evaluation)) == (5, 2)
    assert not {tuple(row["input_ids"]) for row in train} & {tuple(row["input_ids"]) for row in evaluation}
    with pytest.raises(ValueError, match="eval_size: expected less than the 10 records"):
        load(path, tokenizer, eval_size=10)


def test_packing_keeps_whole_records() -> None:
    batch = {"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8, 9]], "labels": [[-100, 2, 3], [-100, 5], [-100, 7, 8, 9]]}
    assert pack_records(batch, max_length=5) == {
        "input_ids": [[1, 2, 3, 4, 5], [6, 7, 8, 9]],
        "labels": [[-100, 2, 3, -100, 5], [-100, 7, 8, 9]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3]],
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_equals_padded_loss(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, attention: str) -> None:
    model = LlamaForCausalLM.from_pretrained(make_llama(tmp_path / "model"), attn_implementation=attention)
    path = write_jsonl(tmp_path / "a.jsonl", make_words(7))
    losses = []
    for packing in (False, True):
        train, _ = load(path, tokenizer, packing=packing, max_length=48)
        batch = AnswerCollator(tokenizer.pad_token_id)(list(train))
        assert ("position_ids" in batch) == packing
        losses.append(model(**batch, use_cache=False).loss)
    assert len(train) < 7
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, "the data set is empty"),
        ([{"question": "a", "answer": "b"}], {}, r"record 0: found the keys \['question', 'answer'\], expected one of"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "c"}],
            {},
            r"record 1: found the keys \['prompt'\], expected prompt, completion as texts",
        ),
        ([{"prompt": "a", "completion": "b"}], {"format": "chat"}, "record 0: .* expected messages as lists"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "record 0: no message has the role assistant"),
        (
            [{"messages": [{"from": "user", "content": "a"}]}],
            {},
            r"record 0: message 0 has the keys \['from', 'content'\]",
        ),
        # releases of datasets differ in whether they read such a file at all
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": [1]}],
            {},
            "(record 1: completion is a list|cannot load split)",
        ),
        ([{"prompt": "a", "completion": ""}], {}, "record 0: the completion is empty"),
        ([{"prompt": "a" * 99, "completion": "b"}], {"max_length": 8}, "no record has an answer within max_length 8"),
    ],
)
def test_wrong_records(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, records: list[Any], options: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "words.jsonl", records)
    with pytest.raises(ValueError, match=f"words.jsonl.*{message}"):
        load(path, tokenizer, **options)


def test_chat_needs_a_template_and_every_format_an_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tiny: the tokenizer has no chat template"):
        load(path, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tiny: the tokenizer has no eos_token"):
        load(path, tokenizer)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", None, "no such file or folder"),
        ("a.txt", "x", r"expected a file that ends in \.json"),
        ("a.jsonl", "{broken", r"a.jsonl, line 1: not valid JSON: .* \(column 2\)"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "compl', "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n[1]\n', "a.jsonl, line 2: expected an object"),
        ("a.json", '[{"prompt": "a"},\n{"prompt"}]', "a.json, line 2: not valid JSON"),
        ("a.json", "[]", "empty|cannot load"),
        ("a.jsonl", "\n \n", "empty"),
        ("a.parquet", "PAR", "cannot load split 'train'"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_records(str(path), None, "train")
    assert "\n" not in str(caught.value)


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "é", "completion": "b"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.jsonl: expected a text in UTF-8"):
        load_records(str(path), None, "train")
