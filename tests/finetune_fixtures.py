"""A tiny LLaMA with a chat tokenizer, and data files, for the tests of the fine-tune scripts."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with ChatML turns; the end-of-sequence token ends a turn."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {text: index for index, text in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_llama(folder: Path, width: int = 32) -> Path:
    """Save a LLaMA, of some ten thousand parameters unless it is wider, and its tokenizer to `folder`."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write one record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make_words(count: int) -> list[dict[str, str]]:
    """Prompt/completion records of different lengths: a number and its digits reversed."""
    numbers = [7**power % 9973 * (1 + power % 3) for power in range(1, count + 1)]
    return [{"prompt": f"{number} backwards:", "completion": f" {str(number)[::-1]}"} for number in numbers]


def make_config(folder: Path, **values: Any) -> Path:
    """A YAML file for short runs of the tiny model, with its data, under `folder`."""
    settings = {
        "model_name_or_path": str(make_llama(folder / "model")),
        "dtype": "float32",
        "r": 2,
        "lora_alpha": 4,
        "dataset": str(write_jsonl(folder / "train.jsonl", make_words(32))),
        "eval_dataset": str(write_jsonl(folder / "eval.jsonl", make_words(6))),
        "max_length": 64,
        "output_dir": str(folder / "out"),
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        **values,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def last_line(capsys: pytest.CaptureFixture[str], caught: pytest.ExceptionInfo[SystemExit]) -> str:
    """The one line that a run ended with, after the progress bars, and that its status is 1."""
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    _, line = err.split("error: ")
    assert line.endswith("\n")
    assert line.count("\n") == 1
    return line
