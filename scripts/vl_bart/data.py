"""Questions about pictures: reading them, the words they are made of, and batches for VL-BART.

A data set is a folder with, for the parts `train` and `test`, PART.safetensors with `features` [pictures, tokens, dim]
(uint8 pixels or floating-point features of regions) and PART.jsonl with records `picture`, `question`, `answer`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

IGNORE = -100
Record = dict[str, Any]


@dataclass
class Part:
    """The pictures and questions of one part.

    Attributes:
        features: [pictures, tokens, dim], uint8 or floating point.
    """

    features: Tensor
    records: list[Record]

    def select(self, records: Iterable[Record]) -> Part:
        return Part(self.features, list(records))

    def pictures(self, index: Sequence[int]) -> Tensor:
        """The features of these pictures; pixels from -1 to 1."""
        found = self.features[torch.tensor(index)]
        return found.float() / 127.5 - 1 if found.dtype is torch.uint8 else found


def load_part(folder: Path, part: str, command: str) -> Part:
    """Read one part of a data set.

    Args:
        command: What to run if the data are missing, for the message.

    Raises:
        ValueError: a file is missing, or a record does not fit the pictures.
    """
    questions, pictures = folder / f"{part}.jsonl", folder / f"{part}.safetensors"
    if missing := [str(path) for path in (questions, pictures) if not path.is_file()]:
        raise ValueError(f"{' and '.join(missing)}: no such file. {command}")
    features = load_file(pictures)["features"]
    records = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    for number, record in enumerate(records, start=1):
        if set(record) != {"picture", "question", "answer"} or not 0 <= record["picture"] < len(features):
            raise ValueError(
                f"{questions}, line {number}: expected picture below {len(features)}, question and answer, found "
                f"{record}"
            )
    return Part(features, records)


def word_tokenizer(records: Iterable[Record]) -> PreTrainedTokenizerFast:
    """One token a word of these questions and answers, for a BART that is trained from scratch."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = pre_tokenizers.Whitespace()
    texts = {text.lower() for record in records for text in (record["question"], record["answer"])}
    words = sorted({piece for text in texts for piece, _ in pieces.pre_tokenize_str(text)})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pieces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make_batch(
    part: Part, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, pictures: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The model's arguments for some records.

    Args:
        pictures: Numbers of the pictures, in the place of the records' own.

    Returns:
        `visual_features` [batch, tokens, dim], `input_ids` and `attention_mask` [batch, length], `labels` [batch,
        answer length] with -100 in the padding; answers end with the end of sequence.
    """
    questions = tokenizer([record["question"] for record in records], padding=True, return_tensors="pt")
    # its id, not its text behind a space: byte-level BPE would make a token of that space
    end = tokenizer.eos_token_id
    answers = tokenizer([record["answer"] for record in records], add_special_tokens=False)["input_ids"]
    labels = [torch.tensor([*ids, end]) for ids in answers]
    features = part.pictures([record["picture"] for record in records] if pictures is None else pictures)
    return {
        "visual_features": features,
        "input_ids": questions["input_ids"],
        "attention_mask": questions["attention_mask"],
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }


def question_only(train: Sequence[Record], test: Sequence[Record]) -> float:
    """The accuracy of who never looks: for each question its most frequent answer in training, or that of all."""
    counts: dict[str, dict[str, int]] = {}
    for record in train:
        for key in (record["question"], ""):
            answers = counts.setdefault(key, {})
            answers[record["answer"]] = answers.get(record["answer"], 0) + 1
    guesses = {question: max(answers, key=lambda a: answers[a]) for question, answers in counts.items()}
    return sum(guesses.get(r["question"], guesses[""]) == r["answer"] for r in test) / len(test)
