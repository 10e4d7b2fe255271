"""VL-BART's data: records, batches, tokenizers, and what prepare_easy_vqa.py makes of the archive."""

import json
import zipfile

import pytest
import torch
from finetune_fixtures import write_jsonl
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
)

import prepare_easy_vqa
from vl_bart import data as data

RECORDS = [
    {"picture": 0, "question": "what color is it?", "answer": "red"},
    {"picture": 1, "question": "what color is it?", "answer": "blue"},
    {"picture": 1, "question": "what color is it?", "answer": "blue"},
    {"picture": 2, "question": "is it a circle?", "answer": "yes"},
]

CPU = torch.device("cpu")


def test_question_only():
    test = [*RECORDS[:3], {"picture": 0, "question": "new?", "answer": "blue"}]
    # blue, and blue for what was never asked
    assert data.question_only(RECORDS, test) == 3 / 4


def test_batches():
    tokenizer = data.word_tokenizer(RECORDS)
    part = data.Part(torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5), RECORDS)
    batch = data.make_batch(part, [RECORDS[3], RECORDS[0]], tokenizer)
    assert torch.equal(batch["visual_features"][1], part.features[0].float() / 127.5 - 1)
    assert tokenizer.decode(batch["labels"][0]).split() == ["yes", "</s>"]
    assert "<unk>" not in tokenizer.decode(batch["input_ids"][1])
    others = data.make_batch(part, [RECORDS[3], RECORDS[0]], tokenizer, [1, 2])
    assert torch.equal(others.pop("visual_features"), part.pictures([1, 2]))
    assert all(torch.equal(others[name], batch[name]) for name in others)


def byte_level_bpe(texts):
    """A tokenizer as BART's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>")


def test_answers_of_byte_level_bpe_end_without_a_space():
    records = [RECORDS[0], {"picture": 1, "question": "what is it?", "answer": "a dark blue one"}]
    tokenizer = byte_level_bpe(text for record in records for text in (record["question"], record["answer"]))
    # what is to be avoided
    assert len(tokenizer("red </s>")["input_ids"]) > len(tokenizer("red</s>")["input_ids"])
    labels = data.make_batch(data.Part(torch.zeros(2, 4, 5), records), records, tokenizer)["labels"]
    for row, record in zip(labels, records, strict=True):
        ids = row[row != data.IGNORE].tolist()
        assert ids == [*tokenizer(record["answer"])["input_ids"], tokenizer.eos_token_id]
        assert tokenizer.decode(ids) == f"{record['answer']}</s>"
        assert (row[len(ids) :] == data.IGNORE).all()
    # one was padded
    assert len({len(row[row != data.IGNORE]) for row in labels}) == 2


def test_patches():
    pixels = torch.arange(16 * 24 * 3).view(16, 24, 3)
    patches = prepare_easy_vqa.patchify(pixels)
    assert patches.shape == (6, 192)
    assert torch.equal(patches[4].view(8, 8, 3), pixels[8:, 8:16])
    with pytest.raises(ValueError, match="found 12 x 16"):
        prepare_easy_vqa.patchify(torch.zeros(12, 16, 3))


def test_silhouettes():
    pixels = torch.full((24, 16, 3), 200)
    # one channel differs enough, on the border of the first patch
    pixels[6:10, 3:5, 0] = 90
    # too like the background
    pixels[20, 12] = 210
    found = prepare_easy_vqa.silhouettes(pixels)
    assert found.shape == (6, 256)
    expected = torch.zeros(32, 24)
    expected[4 + 6 : 4 + 10, 4 + 3 : 4 + 5] = 255
    for index, (row, column) in enumerate((row, column) for row in (0, 8, 16) for column in (0, 8)):
        window = expected[row : row + 16, column : column + 16]
        assert torch.equal(found[index].view(16, 16).float(), window)


def test_prepared_from_the_archive(tmp_path):
    import io

    from PIL import Image

    colours = [(255, 0, 0), (0, 0, 255)]
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        archive.writestr("easy_vqa/data/train/questions.json", json.dumps([["what?", "red", 0], ["what?", "blue", 1]]))
        for number, colour in enumerate(colours):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 8), colour).save(buffer, "png")
            archive.writestr(f"easy_vqa/data/train/images/{number}.png", buffer.getvalue())
    with zipfile.ZipFile(tmp_path / "package.whl") as archive:
        prepare_easy_vqa.write_part(archive, "train", tmp_path)
    features = load_file(tmp_path / "train.safetensors")["features"]
    assert features.shape == (2, 2, 448)
    assert [tuple(f[0, 256:259].tolist()) for f in features] == colours
    assert data.load_part(tmp_path, "train", "").records[1] == {"picture": 1, "question": "what?", "answer": "blue"}


def test_bad_data(tmp_path):
    with pytest.raises(ValueError, match=r"train\.jsonl and .*train\.safetensors: no such file\. Run it\."):
        data.load_part(tmp_path, "train", "Run it.")
    save_file({"features": torch.zeros(2, 1, 1)}, tmp_path / "train.safetensors")
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    with pytest.raises(ValueError, match=r"train\.jsonl, line 4: expected picture below 2"):
        data.load_part(tmp_path, "train", "")
