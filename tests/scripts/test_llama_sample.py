"""The training sequence that is printed before a run: every token, and brackets around what counts in the loss."""

import pytest
from finetune_fixtures import make_tokenizer
from transformers import PreTrainedTokenizerFast

from finetune.encoding import encode_record
from finetune.sample import COLOUR, show_sample


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def encode(tokenizer: PreTrainedTokenizerFast, kind: str, **record: object) -> dict[str, list[int]]:
    return encode_record(record, 0, source="a", kind=kind, tokenizer=tokenizer, max_length=2048)


def test_the_answer_stands_in_brackets(tokenizer: PreTrainedTokenizerFast) -> None:
    row = encode(tokenizer, "prompt_completion", prompt="2+2=", completion="4")
    shown = show_sample(row, tokenizer)
    assert shown.startswith("a training sequence, decoded; 2 of its 6 tokens count in the loss, those in [[ ]]:\n")
    assert shown.endswith("\n  2+2=[[4<|im_end|>]]")
    assert COLOUR not in shown
    assert f"2+2={COLOUR}[[4" in show_sample(row, tokenizer, coloured=True)


def test_every_turn_of_the_assistant_stands_in_brackets(tokenizer: PreTrainedTokenizerFast) -> None:
    words = ("hi", "hello", "bye", "see you")
    messages = [{"role": ("user", "assistant")[at % 2], "content": word} for at, word in enumerate(words)]
    shown = show_sample(encode(tokenizer, "chat", messages=messages), tokenizer)
    assert shown.count("[[") == 3
    assert "assistant\n  [[hello<|im_end|>]]\n" in shown
    assert shown.endswith("assistant\n  [[see you<|im_end|>]]")


def test_the_first_record_of_a_packed_block(tokenizer: PreTrainedTokenizerFast) -> None:
    row = encode(tokenizer, "prompt_completion", prompt="2+2=", completion="4")
    block = {name: row[name] * 2 for name in ("input_ids", "labels")} | {"position_ids": [*range(6), *range(6)]}
    assert show_sample(block, tokenizer) == show_sample(row, tokenizer)


def test_a_long_sequence_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    shown = show_sample(encode(tokenizer, "prompt_completion", prompt="a" * 500, completion="b" * 500), tokenizer)
    assert "501 of its 1001 tokens" in shown
    assert shown.endswith("[[" + "b" * 12 + "]] ... (489 more tokens)")
