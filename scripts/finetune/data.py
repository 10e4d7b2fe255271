"""Records to token ids, with a loss on the answer only.

Three kinds of record are read: `instruction`/`input`/`output` (prompted in the style of Stanford Alpaca),
`prompt`/`completion`, and `messages`, a list of `role`/`content`, through the tokenizer's chat template. Labels are
-100 on everything that the model does not have to say; the answer ends with the end-of-sequence token.

Sequences are padded to the longest of their batch, or packed: whole records side by side in blocks of `max_length`
tokens. `position_ids` restart with every record and no attention mask is passed; from that transformers builds a
block-diagonal mask (eager, SDPA and flex attention; FlashAttention for one block per batch only), so that no record
sees another one.
"""

import csv
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.config import FinetuneConfig

IGNORE = -100
REQUIRED_KEYS = {
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "chat": ("messages",),
}
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_records(source: str, config_name: str | None, split: str) -> Dataset:
    """Load a file, a folder or a data set of the Hub.

    Args:
        source: path of a .json, .jsonl, .csv or .parquet file, of a folder, or a Hub id.
        config_name: configuration of a Hub data set.
        split: split to load; a file has the one split `train`.

    Raises:
        ValueError: if there is nothing there, it cannot be read, or it holds no record.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise ValueError(f"{source}: expected a file that ends in {', '.join(FILE_TYPES)}, found {path.suffix!r}.")
        if not path.read_bytes()[:64].strip():
            raise ValueError(f"{source}: the data set is empty; expected at least one record.")
        request = {"path": FILE_TYPES[path.suffix], "data_files": {split: source}}
        if path.suffix == ".csv":
            # Everything is text: 007, NA and an empty cell stay what they are.
            with path.open(newline="", encoding="utf-8") as lines:
                columns = next(csv.reader(lines))
            features = datasets.Features({name: datasets.Value("string") for name in columns})
            request |= {"features": features, "keep_default_na": False}
    elif not path.is_dir() and (path.suffix in FILE_TYPES or path.is_absolute() or source.startswith(".")):
        raise ValueError(f"{source}: no such file or folder; give the path of the data or the id of a Hub data set.")
    else:
        request = {"path": source, "name": config_name}
    try:
        records = datasets.load_dataset(**request, split=split)
    except Exception as error:
        # The readers raise a different class for each way in which a file can be broken.
        raise ValueError(f"{source}: cannot load split {split!r}: {error.__cause__ or error}") from error
    if len(records) == 0:
        raise ValueError(f"{source}: split {split!r} of the data set is empty; expected at least one record.")
    return records


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


def encode_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels on what the assistant says, the end of each turn included.

    Raises:
        ValueError: for a conversation without assistant turn, a message without its keys, or a template that cannot be
            split into turns.
    """
    for position, message in enumerate(messages):
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            found = keys_with_values(message)
            raise ValueError(f"message {position} has the keys {found}, expected the texts role and content.")
    turns = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("no message has the role assistant, expected at least one to learn from.")
    messages = messages[: turns[-1] + 1]
    if re.search(r"\{%-?\s*generation", tokenizer.get_chat_template()):
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


def find_assistant_spans(
    messages: list[dict[str, Any]], turns: Sequence[int], tokenizer: PreTrainedTokenizerBase
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
        ValueError: naming the source, the index of the record, the keys found and the keys expected.
    """
    where = f"{source}, record {index}"
    keys = REQUIRED_KEYS[kind]
    value_type, type_name = (list, "lists") if kind == "chat" else (str, "texts")
    if not all(isinstance(record.get(key), value_type) for key in keys):
        raise ValueError(
            f"{where}: found the keys {keys_with_values(record)}, expected {', '.join(keys)} as {type_name} for the "
            f"format {kind}. Complete the record, or choose another --format."
        )
    try:
        if kind == "chat":
            ids, labels = encode_chat(record["messages"], tokenizer)
        elif kind == "instruction":
            prompt = format_instruction(record["instruction"], record.get("input"))
            ids, labels = encode_answer(prompt, record["output"], tokenizer)
        else:
            ids, labels = encode_answer(record["prompt"], record["completion"], tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    # Nothing comes before the first token, so nothing can predict it.
    labels = [IGNORE, *labels[1:]][:max_length]
    return {"input_ids": ids[:max_length], "labels": labels, "is_cut": len(ids) > max_length}


def tokenize_records(
    records: Dataset, source: str, tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig
) -> Dataset:
    """Tokenize a data set, drop records whose answer lies beyond `max_length`, and pack if asked to.

    Returns:
        `input_ids` and `labels`, with `position_ids` if packed.

    Raises:
        ValueError: for a record without its keys, a tokenizer without what the format needs, or if nothing is left.
    """
    kind = find_format(records[0], config.format, f"{source}, record 0")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{config.model_name_or_path}: the tokenizer has no eos_token; set one and save it again.")
    if kind == "chat" and tokenizer.chat_template is None:
        raise ValueError(
            f"{config.model_name_or_path}: the tokenizer has no chat template, which chat records need; take a chat "
            "model, or set tokenizer.chat_template and save it again."
        )
    if kind == "chat" and not tokenizer.is_fast:
        raise ValueError(f"{config.model_name_or_path}: chat records need a fast tokenizer, with character offsets.")
    encode = functools.partial(
        encode_record, source=source, kind=kind, tokenizer=tokenizer, max_length=config.max_length
    )
    encoded = records.map(encode, with_indices=True, remove_columns=records.column_names, desc="tokenize")
    num_cut = sum(encoded["is_cut"])
    encoded = encoded.remove_columns("is_cut")
    kept = encoded.filter(has_answer, input_columns="labels", desc="drop records without answer")
    if num_cut:
        PartialState().print(
            f"{source}: {num_cut} of {len(records)} records are longer than max_length {config.max_length} and were "
            f"cut, {len(records) - len(kept)} of them had no answer left and were dropped"
        )
    if len(kept) == 0:
        raise ValueError(f"{source}: no record has an answer within max_length {config.max_length}; raise it.")
    if config.packing:
        pack = functools.partial(pack_records, max_length=config.max_length)
        kept = kept.map(pack, batched=True, remove_columns=kept.column_names, desc="pack")
    return kept


def has_answer(labels: Sequence[int]) -> bool:
    """Whether any label takes part in the loss."""
    return any(label != IGNORE for label in labels)


def pack_records(batch: Mapping[str, list[list[int]]], max_length: int) -> dict[str, list[list[int]]]:
    """Put whole records side by side, in order, into blocks of at most `max_length` tokens."""
    blocks: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        if not blocks["input_ids"] or len(blocks["input_ids"][-1]) + len(ids) > max_length:
            for column in blocks.values():
                column.append([])
        blocks["input_ids"][-1].extend(ids)
        blocks["labels"][-1].extend(labels)
        blocks["position_ids"][-1].extend(range(len(ids)))
    return blocks


def load_datasets(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset | None]:
    """The tokenized training data and, if the configuration asks for it, evaluation data.

    Raises:
        ValueError: as `load_records` and `tokenize_records`, or if `eval_size` leaves nothing to train on.
    """
    train = load_records(config.dataset, config.dataset_config, config.train_split)
    evaluation = None
    if config.eval_dataset is not None:
        evaluation = load_records(config.eval_dataset, config.dataset_config, config.eval_split)
    elif config.eval_size:
        if config.eval_size >= len(train):
            raise ValueError(
                f"eval_size: expected less than the {len(train)} records of {config.dataset}, found {config.eval_size}."
            )
        parts = train.train_test_split(test_size=config.eval_size, seed=config.seed)
        train, evaluation = parts["train"], parts["test"]
    train = tokenize_records(first_records(train, config.max_train_samples), config.dataset, tokenizer, config)
    if evaluation is not None:
        source = config.eval_dataset or config.dataset
        evaluation = tokenize_records(first_records(evaluation, config.max_eval_samples), source, tokenizer, config)
    return train, evaluation


def first_records(records: Dataset, count: int | None) -> Dataset:
    """The first `count` records, or all of them."""
    return records if count is None else records.select(range(min(count, len(records))))


@dataclasses.dataclass
class AnswerCollator:
    """Pads sequences to the longest of the batch.

    Args:
        pad_token_id: fills `input_ids`; its label is -100.

    Returns (from the call):
        `input_ids`, `labels` [batch, length] int64, and `attention_mask` or, for packed blocks, `position_ids`, which
        count again in the padding: it is one more record that nothing sees.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(feature["input_ids"]) for feature in features)
        missing = [length - len(feature["input_ids"]) for feature in features]

        def padded(key: str, filler: int) -> torch.Tensor:
            rows = zip(features, missing, strict=True)
            return torch.tensor([list(feature[key]) + [filler] * count for feature, count in rows])

        batch = {"input_ids": padded("input_ids", self.pad_token_id), "labels": padded("labels", IGNORE)}
        if "position_ids" in features[0]:
            rows = zip(features, missing, strict=True)
            batch["position_ids"] = torch.tensor([list(f["position_ids"]) + list(range(count)) for f, count in rows])
        else:
            batch["attention_mask"] = torch.tensor([[1] * (length - count) + [0] * count for count in missing])
        return batch
