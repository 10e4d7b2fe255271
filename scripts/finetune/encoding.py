"""One record to token ids, with a loss on the answer only.

Three kinds of record are read: `instruction`/`input`/`output` (prompted in the style of Stanford Alpaca);
`prompt`/`completion`, two texts or two lists of messages; and `messages`, a list of `role`/`content`. Messages go
through the tokenizer's chat template. Labels are -100 on everything that the model does not have to say; the answer
ends with the end-of-sequence token.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

IGNORE = -100
REQUIRED_KEYS = {
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "chat": ("messages",),
}


def find_format(record: Mapping[str, Any], format_name: str, where: str) -> str:
    """Return the format of a record: `format_name`, or for `auto` the one whose keys it has."""
    if format_name != "auto":
        return format_name
    found = keys_with_values(record)
    for name, keys in REQUIRED_KEYS.items():
        if set(keys) <= set(found):
            return name
    expected = "; ".join(f"{', '.join(keys)} ({name})" for name, keys in REQUIRED_KEYS.items())
    raise ValueError(f"{where}: found the keys {found}, expected one of: {expected}. Rename the keys of the records.")


def keys_with_values(record: Mapping[str, Any]) -> list[str]:
    """The keys of a record; `datasets` fills those that only other records have with None."""
    return [key for key, value in record.items() if value is not None]


def format_instruction(instruction: str, context: str | None) -> str:
    """The prompt of an instruction record, in Alpaca's wording."""
    request = f"### Instruction:\n{instruction}\n\n"
    if not context:
        opening = "Below is an instruction that describes a task. "
    else:
        opening = "Below is an instruction that describes a task, paired with an input that provides further context. "
        request += f"### Input:\n{context}\n\n"
    return f"{opening}Write a response that appropriately completes the request.\n\n{request}### Response:\n"


def encode_answer(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and labels of `prompt` followed by `answer` and the end-of-sequence token.

    The two are tokenized apart: the prompt gets the very tokens that it has when the model is asked to continue it.
    """
    prompt_ids = tokenizer(prompt)["input_ids"]
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
        # Some tokenizers close every text.
        prompt_ids = prompt_ids[:-1]
    answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt_ids + answer_ids, [IGNORE] * len(prompt_ids) + answer_ids


def encode_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, num_given: int = 0
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels on what the assistant says, the end of each turn included.

    Args:
        messages: mappings of `role` and `content`.
        num_given: messages at the start that are the prompt, of which nothing is learned.

    Raises:
        ValueError: for a conversation without assistant turn, a message without its keys, an empty answer, or a
            template that cannot be split into turns.
    """
    check_messages(messages)
    turns = [at for at, message in enumerate(messages) if at >= num_given and message["role"] == "assistant"]
    if not turns:
        where = " of the completion" if num_given else ""
        raise ValueError(f"no message{where} has the role assistant, expected at least one to learn from.")
    for turn in turns:
        check_answer(messages[turn]["content"], f"content of message {turn}")
    messages = messages[: turns[-1] + 1]
    # The marks tell the assistant's words from all others, but not a completion's from a prompt's.
    if not num_given and re.search(r"\{%-?\s*generation", tokenizer.get_chat_template()):
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, is_answer = list(encoded["input_ids"]), list(map(bool, encoded["assistant_masks"]))
    else:
        text, spans = find_assistant_spans(messages, turns, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        is_answer = [any(start <= at < end for start, end in spans) for at, _ in encoded["offset_mapping"]]
    end = max((position for position, flag in enumerate(is_answer) if flag), default=-1) + 1
    ids, is_answer = ids[:end], is_answer[:end]
    if ids[-1] != tokenizer.eos_token_id:
        # Either the template leaves the token out of the turn, or it does not write it at all.
        ids, is_answer = [*ids, tokenizer.eos_token_id], [*is_answer, True]
    return ids, [token if flag else IGNORE for token, flag in zip(ids, is_answer, strict=True)]


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError for the first message that is not a role and its words."""
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {position} is {name_type(message)}, expected the texts role and content.")
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            found = keys_with_values(message)
            raise ValueError(f"message {position} has the keys {found}, expected the texts role and content.")


def check_answer(text: str, what: str) -> None:
    """Raise a ValueError if there is nothing to learn."""
    if not text.strip():
        raise ValueError(f"the {what} is empty, expected a text to learn. Complete or remove the record.")


def find_assistant_spans(
    messages: Sequence[Mapping[str, Any]], turns: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the character range of every assistant turn without its header.

    A turn is what the template adds to the conversation before it when asked for a generation prompt.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for turn in turns:
        before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False).rstrip()
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"the chat template renders the conversation differently once message {turn} is followed by others, so "
                "that its turns cannot be told apart; expected a template with {% generation %} marks, or records with "
                "one assistant turn."
            )
        spans.append((len(before), len(after)))
    return text, spans


def encode_record(
    record: Mapping[str, Any],
    index: int,
    *,
    source: str,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, Any]:
    """Token ids and labels of one record, cut to `max_length`.

    Raises:
        ValueError: naming the source, the index of the record, what was found and what was expected.
    """
    try:
        ids, labels = encode_as(kind, record, tokenizer)
    except (ValueError, TemplateError) as error:
        raise ValueError(f"{source}, record {index}: {error}") from error
    # Nothing comes before the first token, so nothing can predict it.
    labels = [IGNORE, *labels[1:]][:max_length]
    return {"input_ids": ids[:max_length], "labels": labels, "is_cut": len(ids) > max_length}


def encode_as(kind: str, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and labels of a record of the format `kind`.

    Raises:
        ValueError: naming what is missing, of the wrong type or empty.
    """
    if kind == "chat":
        check_types(record, kind, list)
        return encode_chat(record["messages"], tokenizer)
    if kind == "instruction":
        check_types(record, kind, str)
        context = record.get("input")
        if not isinstance(context, str | None):
            raise ValueError(f"input is {name_type(context)}, expected a text.")
        check_answer(record["output"], "output")
        return encode_answer(format_instruction(record["instruction"], context), record["output"], tokenizer)
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        if not prompt:
            raise ValueError("the prompt holds no message, expected at least one.")
        check_template(tokenizer)
        return encode_chat([*prompt, *completion], tokenizer, num_given=len(prompt))
    check_types(record, kind, str)
    check_answer(record["completion"], "completion")
    return encode_answer(record["prompt"], record["completion"], tokenizer)


def check_types(record: Mapping[str, Any], kind: str, expected: type) -> None:
    """Raise a ValueError for a key of the format `kind` that is missing, or whose value is of another type."""
    keys, noun = REQUIRED_KEYS[kind], "lists" if expected is list else "texts"
    for key in keys:
        value = record.get(key)
        if not isinstance(value, expected):
            missing = value is None
            found = f"found the keys {keys_with_values(record)}" if missing else f"{key} is {name_type(value)}"
            raise ValueError(
                f"{found}, expected {', '.join(keys)} as {noun} for the format {kind}. Complete the record, or choose "
                "another --format."
            )


def name_type(value: object) -> str:
    """What a value of a record is, in the words of its format."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if messages cannot be told apart with this tokenizer."""
    name = tokenizer.name_or_path
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{name}: the tokenizer has no chat template, which messages need; take a chat model, or set "
            "tokenizer.chat_template and save it again."
        )
    if not tokenizer.is_fast:
        raise ValueError(f"{name}: messages need a fast tokenizer, with character offsets.")
