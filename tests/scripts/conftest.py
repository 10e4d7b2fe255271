"""What the tests of several scripts start from: one thread, data sets cached in a temporary folder, refusals."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from benchmark_fixtures import SMALL
from commonsense_fixtures import make_record, write_list
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import benchmark
from prepare.commonsense import TASKS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine threads that wait for each other make these tiny models up to fifty times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """That a command ends with an error that matches a pattern, and without a traceback."""

    @contextlib.contextmanager
    def check(pattern: str) -> Iterator[None]:
        with pytest.raises(SystemExit):
            yield
        assert re.search(f"error: .*{pattern}", capsys.readouterr().err)

    return check


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """A folder as LLM-Adapters lays its data out, 6 training records and 3 test records per task."""
    folder = tmp_path / "LLM-Adapters"
    train = [make_record(task, number) for number in range(10, 16) for task in TASKS]
    write_list(folder / "ft-training_set" / "commonsense_170k.json", train)
    for task in TASKS:
        write_list(folder / "dataset" / task / "test.json", [make_record(task, number) for number in range(3)])
    return folder


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a suite at toy size, and return what it stored."""

    def run(suite: str, *flags: str) -> dict[str, Any]:
        path = tmp_path / "stored.json"
        benchmark.main([suite, *SMALL, "--seq-len", "16", "--json", str(path), *flags])
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        return json.loads(path.read_text(encoding="utf-8"))

    return run


@pytest.fixture
def tiny_llama(tmp_path: Path) -> tuple[str, PreTrainedTokenizerFast]:
    """A LLaMA of a few thousand parameters with a tokenizer of single characters, saved to a folder."""
    vocabulary = {character: index for index, character in enumerate(map(chr, range(32, 127)))}
    vocabulary |= {"\n": len(vocabulary), "<eos>": len(vocabulary) + 1}
    model = models.WordLevel(vocabulary, unk_token="<eos>")
    characters = Tokenizer(model)
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    folder = str(tmp_path / "llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer
