"""Data sets to batches: files are read, records encoded (encoding.py), padded or packed.

Sequences are padded to the longest of their batch, or packed: whole records side by side in blocks of `max_length`
tokens. `position_ids` restart with every record and no attention mask is passed; from that transformers builds a
block-diagonal mask (eager, SDPA and flex attention; FlashAttention for one block per batch only), so that no record
sees another one.
"""

import csv
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common.errors import one_line
from finetune.arguments import DataArguments
from finetune.encoding import IGNORE, check_template, encode_record, find_format

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
        if path.suffix in (".json", ".jsonl", ".csv"):
            check_text(path)
        request: dict[str, Any] = {"path": FILE_TYPES[path.suffix], "data_files": {split: source}}
    elif not path.is_dir() and (path.suffix in FILE_TYPES or path.is_absolute() or source.startswith(".")):
        raise ValueError(f"{source}: no such file or folder; give the path of the data or the id of a Hub data set.")
    else:
        request = {"path": source, "name": config_name}
    try:
        if path.is_file() and path.suffix == ".csv":
            # Everything is text: 007, NA and an empty cell stay what they are.
            with path.open(newline="", encoding="utf-8") as lines:
                columns = next(csv.reader(lines))
            features = datasets.Features({name: datasets.Value("string") for name in columns})
            request |= {"features": features, "keep_default_na": False}
        records = datasets.load_dataset(**request, split=split)
    except Exception as error:
        if path.is_file() and path.suffix in (".json", ".jsonl"):
            check_json(path)
        # The readers raise a different class for each way in which a file can be broken.
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"{source}: cannot load split {split!r}: {reason}") from error
    if len(records) == 0:
        raise ValueError(f"{source}: split {split!r} of the data set is empty; expected at least one record.")
    return records


def check_text(path: Path) -> None:
    """Raise a ValueError for a file that is empty, or not in UTF-8, which `datasets` reads as something else."""
    try:
        with path.open(encoding="utf-8") as lines:
            num_filled = sum(1 for line in lines if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text in UTF-8: {error}.") from error
    if num_filled == 0:
        raise ValueError(f"{path}: the data set is empty; expected at least one record.")


def check_json(path: Path) -> None:
    """Say which line of a file is no JSON, or no record; the reader of `datasets` names a block of lines at best.

    Raises:
        ValueError: naming the line, if there is one.
    """
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}.") from error
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error.msg} (column {error.colno}).") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: expected an object with the record's keys, found {line[:40]!r}.")


def tokenize_records(records: Dataset, source: str, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> Dataset:
    """Tokenize a data set, drop records whose answer lies beyond `max_length`, and pack if asked to.

    Returns:
        `input_ids` and `labels`, with `position_ids` if packed.

    Raises:
        ValueError: for a record without its keys, a tokenizer without what the format needs, or if nothing is left.
    """
    kind = find_format(records[0], data.format, f"{source}, record 0")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no eos_token; set one and save it again.")
    if kind == "chat":
        check_template(tokenizer)
    encode = functools.partial(encode_record, source=source, kind=kind, tokenizer=tokenizer, max_length=data.max_length)
    encoded = records.map(encode, with_indices=True, remove_columns=records.column_names, desc="tokenize")
    num_cut = sum(encoded["is_cut"])
    encoded = encoded.remove_columns("is_cut")
    kept = encoded.filter(has_answer, input_columns="labels", desc="drop records without answer")
    if num_cut:
        PartialState().print(
            f"{source}: {num_cut} of {len(records)} records are longer than max_length {data.max_length} and were "
            f"cut, {len(records) - len(kept)} of them had no answer left and were dropped"
        )
    if len(kept) == 0:
        raise ValueError(f"{source}: no record has an answer within max_length {data.max_length}; raise it.")
    if data.packing:
        pack = functools.partial(pack_records, max_length=data.max_length)
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


def load_datasets(data: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Dataset, Dataset | None]:
    """The tokenized training data and, if they are asked for, evaluation data.

    Args:
        seed: chooses the records that `eval_size` holds out.

    Raises:
        ValueError: as `load_records` and `tokenize_records`, or if `eval_size` leaves nothing to train on.
    """
    train = load_records(data.dataset, data.dataset_config, data.train_split)
    evaluation = None
    if data.eval_dataset is not None:
        evaluation = load_records(data.eval_dataset, data.dataset_config, data.eval_split)
    elif data.eval_size:
        if data.eval_size >= len(train):
            raise ValueError(
                f"eval_size: expected less than the {len(train)} records of {data.dataset}, found {data.eval_size}."
            )
        parts = train.train_test_split(test_size=data.eval_size, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    train = tokenize_records(first_records(train, data.max_train_samples), data.dataset, tokenizer, data)
    if evaluation is not None:
        source = data.eval_dataset or data.dataset
        evaluation = tokenize_records(first_records(evaluation, data.max_eval_samples), source, tokenizer, data)
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
