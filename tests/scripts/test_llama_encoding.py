"""Records to tokens: labels on the answer only, chat turns, conversational completions, errors that name the key."""

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_fixtures import make_tokenizer, write_jsonl
from transformers import PreTrainedTokenizerFast

from finetune.arguments import DataArguments
from finetune.data import load_datasets
from finetune.encoding import IGNORE, encode_chat, encode_record

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A:{% generation %}{{ message.content }}"
    "{% endgeneration %}|{% else %}U:{{ message.content }}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **values: Any) -> tuple[Any, Any]:
    return load_datasets(DataArguments(dataset=str(path), **values), tokenizer, seed=42)


def answer(tokenizer: PreTrainedTokenizerFast, row: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORE])


def test_prompt_completion(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "2+2=", "completion": "4"}])
    train, _ = load(path, tokenizer)
    assert tokenizer.decode(train[0]["input_ids"]) == "2+2=4<|im_end|>"
    assert answer(tokenizer, train[0]) == "4<|im_end|>"


def test_instruction_with_and_without_input(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Go.", "input": "", "output": "ok"},
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    train, _ = load(path, tokenizer)
    texts = [tokenizer.decode(row["input_ids"]) for row in train]
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>" in texts[0]
    assert "### Input" not in texts[1]
    assert [answer(tokenizer, row) for row in train] == ["3<|im_end|>", "ok<|im_end|>"]


def test_chat_trains_on_every_assistant_turn(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [*CHAT, {"role": "user", "content": "and?"}]}])
    train, _ = load(path, tokenizer)
    assert answer(tokenizer, train[0]) == "hello<|im_end|>see you<|im_end|>"
    assert tokenizer.decode(train[0]["input_ids"]).endswith("see you<|im_end|>")


def test_chat_template_with_generation_marks(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = MARKED
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


@pytest.mark.parametrize("template", [None, MARKED])
def test_a_conversational_completion_alone_is_learned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": CHAT[:3], "completion": CHAT[3:]}])
    train, _ = load(path, tokenizer)
    end = "|" if template else ""
    assert answer(tokenizer, train[0]) == f"see you{end}<|im_end|>"
    # "hello" is an assistant's as well, but the prompt's
    text = tokenizer.apply_chat_template(CHAT, tokenize=False).rstrip()
    assert tokenizer.decode(train[0]["input_ids"]) == text + ("<|im_end|>" if template else "")


def test_a_conversational_completion_of_several_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    record = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    row = encode_record(record, 0, source="a", kind="prompt_completion", tokenizer=tokenizer, max_length=512)
    assert answer(tokenizer, row) == "hello<|im_end|>see you<|im_end|>"


def test_a_conversational_record_has_the_prompt_that_generation_has(tokenizer: PreTrainedTokenizerFast) -> None:
    record = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    row = encode_record(record, 0, source="a", kind="prompt_completion", tokenizer=tokenizer, max_length=512)
    prompt = tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt
    assert [label == IGNORE for label in row["labels"]] == [at < len(prompt) for at in range(len(row["labels"]))]


TEXTS = {"prompt": "a", "completion": "b"}
TURNS = {"prompt": CHAT[:1], "completion": CHAT[1:2]}


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("prompt_completion", TEXTS | {"completion": " "}, "the completion is empty, expected a text to learn"),
        (
            "prompt_completion",
            TEXTS | {"completion": 4},
            "completion is a number, expected prompt, completion as texts",
        ),
        ("prompt_completion", TEXTS | {"prompt": None}, r"found the keys \['completion'\]"),
        ("prompt_completion", TURNS | {"prompt": "a"}, "completion is a list, expected prompt, completion as texts"),
        ("prompt_completion", TURNS | {"prompt": []}, "the prompt holds no message"),
        ("prompt_completion", TURNS | {"completion": CHAT[:1]}, "no message of the completion has the role assistant"),
        (
            "prompt_completion",
            TURNS | {"completion": [{"role": "assistant", "content": ""}]},
            "the content of message 1 is empty",
        ),
        (
            "prompt_completion",
            TURNS | {"completion": ["b"]},
            "message 1 is a text, expected the texts role and content",
        ),
        ("instruction", {"instruction": "a", "output": ""}, "the output is empty"),
        ("instruction", {"instruction": "a", "input": [1], "output": "b"}, "input is a list, expected a text"),
        ("instruction", {"instruction": {"a": 1}, "output": "b"}, "instruction is an object"),
        ("chat", {"messages": "hello"}, "messages is a text, expected messages as lists"),
        ("chat", {"messages": [{"role": "assistant", "content": " "}]}, "the content of message 0 is empty"),
    ],
)
def test_wrong_values_are_named(
    tokenizer: PreTrainedTokenizerFast, kind: str, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"a.jsonl, record 7: {message}"):
        encode_record(record, 7, source="a.jsonl", kind=kind, tokenizer=tokenizer, max_length=512)


def test_a_template_that_refuses_is_quoted(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('Conversation roles must alternate') }}"
    with pytest.raises(ValueError, match="record 0: Conversation roles must alternate"):
        encode_record(TURNS, 0, source="a", kind="prompt_completion", tokenizer=tokenizer, max_length=512)


def test_messages_need_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"record 0: .*the tokenizer has no chat template, which messages need"):
        encode_record(TURNS, 0, source="a", kind="prompt_completion", tokenizer=tokenizer, max_length=512)
