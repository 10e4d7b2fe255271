"""Records to tokens: labels on the answer only, chat turns, packing, and errors that name the record."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from finetune_fixtures import make_llama, make_tokenizer, make_words, write_jsonl
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.config import FinetuneConfig
from finetune.data import IGNORE, AnswerCollator, encode_chat, load_datasets, load_records, pack_records

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def config_for(path: Path, **values: Any) -> FinetuneConfig:
    return FinetuneConfig(model_name_or_path="tiny", dataset=str(path), output_dir="out", **values)


def answer(tokenizer: PreTrainedTokenizerFast, row: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORE])


def test_prompt_completion(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "2+2=", "completion": "4"}])
    train, _ = load_datasets(config_for(path), tokenizer)
    assert tokenizer.decode(train[0]["input_ids"]) == "2+2=4<|im_end|>"
    assert answer(tokenizer, train[0]) == "4<|im_end|>"


def test_instruction_with_and_without_input(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Go.", "input": "", "output": "ok"},
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    train, _ = load_datasets(config_for(path), tokenizer)
    texts = [tokenizer.decode(row["input_ids"]) for row in train]
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>" in texts[0]
    assert "### Input" not in texts[1]
    assert [answer(tokenizer, row) for row in train] == ["3<|im_end|>", "ok<|im_end|>"]


def test_chat_trains_on_every_assistant_turn(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [*CHAT, {"role": "user", "content": "and?"}]}])
    train, _ = load_datasets(config_for(path), tokenizer)
    assert answer(tokenizer, train[0]) == "hello<|im_end|>see you<|im_end|>"
    assert tokenizer.decode(train[0]["input_ids"]).endswith("see you<|im_end|>")


def test_chat_template_with_generation_marks(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}A:{% generation %}{{ message.content }}"
        "{% endgeneration %}|{% else %}U:{{ message.content }}|{% endif %}{% endfor %}"
    )
    ids, labels = encode_chat(CHAT, tokenizer)
    assert answer(tokenizer, {"labels": labels}) == "hellosee you<|im_end|>"
    assert tokenizer.decode(ids) == "U:hi|A:hello|U:bye|A:see you<|im_end|>"


def test_chat_template_that_rewrites_earlier_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}:{% if loop.last %}!{% endif %}{{ message.content }}\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(ValueError, match="renders the conversation differently once message 1"):
        encode_chat(CHAT, tokenizer)


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
    train, _ = load_datasets(config_for(path), tokenizer)
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
    train, _ = load_datasets(config_for(path, max_length=8), tokenizer)
    assert [len(row["input_ids"]) for row in train] == [7, 8]
    out = " ".join(capsys.readouterr().out.split())
    assert "2 of 3 records are longer than max_length 8 and were cut, 1 of them had no answer left" in out


def test_eval_size_holds_records_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_words(10))
    train, evaluation = load_datasets(config_for(path, eval_size=3, max_train_samples=5, max_eval_samples=2), tokenizer)
    assert (len(train), len(evaluation)) == (5, 2)
    assert not {tuple(row["input_ids"]) for row in train} & {tuple(row["input_ids"]) for row in evaluation}
    with pytest.raises(ValueError, match="eval_size: expected less than the 10 records"):
        load_datasets(config_for(path, eval_size=10), tokenizer)


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
        train, _ = load_datasets(config_for(path, packing=packing, max_length=48), tokenizer)
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
        ([{"prompt": "a" * 99, "completion": "b"}], {"max_length": 8}, "no record has an answer within max_length 8"),
    ],
)
def test_wrong_records(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, records: list[Any], options: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "words.jsonl", records)
    with pytest.raises(ValueError, match=f"words.jsonl.*{message}"):
        load_datasets(config_for(path, **options), tokenizer)


def test_chat_needs_a_template_and_every_format_an_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tiny: the tokenizer has no chat template"):
        load_datasets(config_for(path), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tiny: the tokenizer has no eos_token"):
        load_datasets(config_for(path), tokenizer)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", None, "no such file or folder"),
        ("a.txt", "x", r"expected a file that ends in \.json"),
        ("a.jsonl", "{broken", "cannot load split 'train'"),
        ("a.json", "[]", "empty|cannot load"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_records(str(path), None, "train")
