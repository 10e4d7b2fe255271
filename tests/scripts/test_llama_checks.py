"""What ends a fine-tune run before a model is loaded: output folder, trackers, Hub, precision, packages, data."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from finetune_fixtures import last_line, make_config
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils

import finetune_llama
from finetune import checkpoints, checks
from finetune.options import build_parser

Refused = Callable[[str], contextlib.AbstractContextManager[None]]


def finetune(config: Path, *flags: object) -> None:
    finetune_llama.main([str(config), "--max_steps", "1", *map(str, flags)])


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test fails if a model is loaded."""
    monkeypatch.setattr(finetune_llama, "build_model", lambda *_: pytest.fail("the model was loaded"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and, in `out`, what a DoRA run with a checkpoint left."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        finetune(make_config(folder, save_steps=1))
    return folder


@pytest.fixture
def config(finished: Path, tmp_path: Path) -> Path:
    """The configuration of the finished run, and a copy of its output in `tmp_path`."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return finished / "config.yaml"


# output folder


@pytest.mark.parametrize("flags", [["--method", "full"], ["--method", "lora"], ["--r", "3"], []])
def test_a_folder_with_another_runs_output_is_refused(
    config: Path, tmp_path: Path, flags: list[str], refused: Refused, unloaded: None
) -> None:
    shutil.rmtree(tmp_path / "out" / "checkpoint-1")
    with refused("holds .*eval_results.json of an earlier run; choose another --output_dir, or remove it"):
        finetune(config, "--output_dir", tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "full"], "checkpoint-1 is of a run with the method dora, expected full"),
        (["--method", "lora"], "checkpoint-1 is of a run with the method dora, expected lora"),
        (["--method", "peft_dora"], "not of this one: method is 'dora' there and 'peft_dora' here"),
        (["--r", "3"], "not of this one: r is 2 there and 3 here"),
        (["--max_length", "32"], "max_length is 64 there and 32 here"),
    ],
)
def test_another_run_does_not_continue(
    config: Path, tmp_path: Path, flags: list[str], message: str, refused: Refused, unloaded: None
) -> None:
    with refused(message):
        finetune(config, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", *flags)


def test_another_runs_adapter_is_not_continued_without_a_checkpoint(
    config: Path, tmp_path: Path, refused: Refused, unloaded: None
) -> None:
    shutil.rmtree(tmp_path / "out" / "checkpoint-1")
    with refused("not of this one: method is 'dora' there and 'full' here"):
        finetune(config, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "--method", "full")
    # from before there were settings
    (tmp_path / "out" / "run_settings.json").unlink()
    with refused("not of this one: weights is 'dora' there and 'full' here"):
        finetune(config, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "--method", "full")


@pytest.mark.parametrize("has_settings", [True, False])
def test_the_same_run_continues(config: Path, tmp_path: Path, has_settings: bool) -> None:
    if not has_settings:
        (tmp_path / "out" / "run_settings.json").unlink()
    flags = ["--resume_from_checkpoint", "--max_steps", 2, "--learning_rate", 1e-4]
    finetune(config, "--output_dir", tmp_path / "out", *flags)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--r", "4"], "checkpoint-1 is not of this run: r is 2 there and 4 here"),
        (["--target_modules", "q_proj"], "target_modules is 'all-linear' there and .*q_proj"),
        (["--optim", "sgd"], "optim is 'adamw_torch' there and 'sgd' here"),
    ],
)
def test_another_folders_checkpoint_is_of_the_same_run(
    config: Path, tmp_path: Path, flags: list[str], message: str, refused: Refused, unloaded: None
) -> None:
    resume = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1"]
    with refused(message):
        finetune(config, "--output_dir", tmp_path / "new", *resume, *flags)


def test_a_checkpoint_is_continued_by_its_optimizer(
    config: Path, tmp_path: Path, refused: Refused, unloaded: None
) -> None:
    out = tmp_path / "out"
    with refused("optim is 'adamw_torch' there and 'sgd' here"):
        finetune(config, "--output_dir", out, "--resume_from_checkpoint", "--optim", "sgd")
    # of which nothing is left
    checkpoint = out / "checkpoint-1"
    (checkpoint / "optimizer.pt").unlink()
    checkpoints.check_same_run(checkpoint, out, "dora", "sgd", {})


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_a_checkpoint_is_continued_in_another_folder(config: Path, tmp_path: Path, optimizer: str) -> None:
    resume = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1", "--max_steps", 2]
    finetune(config, "--output_dir", tmp_path / "new", *resume, "--optim", optimizer)
    state = json.loads((tmp_path / "new" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]


def test_a_folder_without_weights_is_taken(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "memory.json").write_text("{}", encoding="utf-8")
    finetune(config, "--output_dir", folder)
    assert (folder / "adapter_config.json").is_file()


def test_a_folder_that_cannot_be_written_to(config: Path, tmp_path: Path, refused: Refused, unloaded: None) -> None:
    (tmp_path / "file").touch()
    with refused("output_dir: cannot write to .*file: "):
        finetune(config, "--output_dir", tmp_path / "file")
    with refused("output_dir: cannot write to .*file/out: Not a directory"):
        finetune(config, "--output_dir", tmp_path / "file" / "out")


# trackers, Hub, precision, packages


def test_an_unknown_tracker(config: Path, refused: Refused, unloaded: None) -> None:
    with refused("report_to: tensorbord is not supported, only .*tensorboard"):
        finetune(config, "--output_dir", "new", "--report_to", "tensorbord")


def test_a_tracker_that_is_not_installed(
    config: Path, refused: Refused, unloaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with refused("report_to: WandbCallback requires wandb to be installed.* Or choose --report_to none"):
        finetune(config, "--output_dir", "new", "--report_to", "wandb")


def test_a_tracker_gets_the_losses(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []

    class Recorder(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            logged.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    finetune(config, "--output_dir", tmp_path / "new", "--report_to", "recorder")
    assert "loss" in logged[0]


def test_push_to_hub_needs_a_token(
    config: Path, refused: Refused, unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "get_token", lambda: None)
    with refused("push_to_hub: no token of the Hub; run `hf auth login`, or set HF_TOKEN"):
        finetune(config, "--output_dir", tmp_path / "new", "--push_to_hub")


def test_the_hub_refuses_before_a_model_is_loaded(
    config: Path, refused: Refused, unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HfHubHTTPError(
            "401 Client Error.\n\nInvalid user token.", response=SimpleNamespace(headers={}, request=None)
        )

    monkeypatch.setattr(checks, "create_repo", refuse)
    with refused("push_to_hub: cannot create or reach me/words: 401 Client Error. Invalid user token."):
        finetune(config, "--output_dir", tmp_path / "new", "--push_to_hub", "--hub_model_id=me/words", "--hub_token=x")


@pytest.mark.parametrize("name", ["me/words", None])
def test_push_to_hub(config: Path, tmp_path: Path, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[Any] = []
    uploads: list[dict[str, Any]] = []

    def create(name: str, **options: Any) -> SimpleNamespace:
        created.append((name, options))
        return SimpleNamespace(repo_id=f"me/{name}" if "/" not in name else name)

    monkeypatch.setattr(checks, "create_repo", create)
    monkeypatch.setattr(finetune_llama, "upload_folder", lambda **options: uploads.append(options))
    flags = ["--hub_model_id", name] if name else []
    folder = tmp_path / "new"
    finetune(config, "--output_dir", folder, "--push_to_hub", "--hub_token=x", "--hub_private_repo=true", *flags)
    assert created == [(name or "new", {"token": "x", "private": True, "exist_ok": True})]
    (upload,) = uploads
    assert (upload["repo_id"], upload["token"]) == (name or "me/new", "x")
    # what holds local paths stays
    assert {"checkpoint-*/*", "training_args.bin", "run_settings.json"} <= set(upload["ignore_patterns"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fp16"], "fp16 needs a GPU"),
        (["--dtype", "float16", "--bf16"], "exclude each other"),
        (["--eval_dataset", "null", "--eval_steps", "1"], "need evaluation data"),
        (["--push_to_hub", "--hub_strategy", "every_save"], "hub_strategy: expected end"),
        (["--batch_eval_metrics"], "batch_eval_metrics"),
        (["--label_names", "x"], r"label_names: .* found \['x'\]"),
        (["--metric_for_best_model", "x"], "metric_for_best_model: expected one of loss, .*, found 'x'"),
        (["--lr_scheduler_kwargs", '{"bogus": 1}'], "lr_scheduler_type linear with .* argument 'bogus'"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_type cosine_with_min_lr .*min_lr_rate should"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "lr_scheduler_type warmup_stable_decay .*num_decay_steps"),
    ],
)
def test_options_that_cannot_be_met(
    config: Path, tmp_path: Path, flags: list[str], message: str, refused: Refused, unloaded: None
) -> None:
    with refused(message):
        finetune(config, "--output_dir", tmp_path / "new", *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--label_names", "labels"],
        ["--metric_for_best_model", "eval_loss"],
        ["--metric_for_best_model", "runtime"],
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-5}'],
        ["--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 1}'],
        ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_steps", "1"],
        ["--max_steps", "-1", "--warmup_steps", "0.5", "--lr_scheduler_type", "polynomial"],
    ],
)
def test_options_that_can_be_met_pass(config: Path, tmp_path: Path, flags: list[str]) -> None:
    model, data, args, _ = build_parser("").parse([str(config), "--output_dir", str(tmp_path), *flags])
    checks.check_options(model, data, args)


def test_deepspeed_is_not_left_out_in_silence(config: Path, tmp_path: Path) -> None:
    model, data, args, _ = build_parser("").parse([str(config), "--output_dir", str(tmp_path)])
    args.deepspeed = "zero2.json"
    with pytest.raises(ValueError, match="deepspeed and use_cpu exclude each other"):
        checks.check_options(model, data, args)


def test_4_bit_needs_bitsandbytes(
    config: Path, tmp_path: Path, refused: Refused, unloaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with refused("load_in_4bit needs bitsandbytes"):
        finetune(config, "--output_dir", tmp_path / "new", "--load_in_4bit")


# data and model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "train.jsonl: no such file or folder"),
        ("", "train.jsonl: the data set is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"', "train.jsonl, line 2: not valid JSON"),
        ('{"question": "a"}\n', "train.jsonl, record 0: found the keys ['question'], expected one of"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "record 1: found the keys ['prompt']"),
        ('{"prompt": "a", "completion": ""}\n', "record 0: the completion is empty"),
        ('{"prompt": "a", "completion": 1}\n', "record 0: completion is a number"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "no message has the role assistant"),
    ],
)
def test_bad_data_is_one_line(
    config: Path, tmp_path: Path, text: str | None, message: str, unloaded: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        finetune(config, "--output_dir", tmp_path / "new", "--dataset", path)
    assert message in last_line(capsys, caught)


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--target_modules"])
def test_a_bad_model_or_adapter_is_one_line(
    config: Path, tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        finetune(config, "--output_dir", tmp_path / "new", flag, tmp_path / "no_such_proj")
    assert "no_such_proj" in last_line(capsys, caught)


def test_a_tokenizer_larger_than_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as caught:
        finetune(config)
    assert "the tokenizer has 100 tokens, the model 99 embeddings" in last_line(capsys, caught)


def test_the_traceback_is_there_for_those_who_ask(config: Path, tmp_path: Path, unloaded: None) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        finetune(config, "--output_dir", tmp_path / "new", "--dataset", tmp_path / "a.jsonl", "--log_level", "debug")
