"""What shows as a fine-tune run prepares to train: options of data loader and optimizer, a checkpoint, 4-bit layers."""

import json
from pathlib import Path

import pytest
import torch
from finetune_fixtures import last_line, make_config

import finetune_llama
from finetune import checks


def finetune(config: Path, *flags: object) -> None:
    finetune_llama.main([str(config), "--max_steps", "1", *map(str, flags)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--dataloader_drop_last", "--per_device_train_batch_size", "33"],
            "dataloader_drop_last: leaves nothing of 32",
        ),
        (["--dataloader_persistent_workers"], "before training: ValueError: persistent_workers option needs"),
        (["--optim", "rmsprop", "--optim_args", "alpha=-3"], "optim rmsprop: Invalid alpha value: -3.0"),
    ],
)
def test_what_shows_before_the_first_step_is_one_line(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        finetune(make_config(tmp_path), "--output_dir", tmp_path / "new", *flags)
    assert message in last_line(capsys, caught)
    assert not (tmp_path / "new" / "adapter_config.json").exists()


def test_a_batch_of_all_records_is_not_left_out(tmp_path: Path) -> None:
    finetune(
        make_config(tmp_path),
        "--output_dir",
        tmp_path / "new",
        "--dataloader_drop_last",
        "--per_device_train_batch_size",
        32,
    )
    state = json.loads((tmp_path / "new" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--r", "4"], "AdapterShapeError: "), (["--target_modules", "q_proj"], "ValueError: loaded state dict contains")],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, save_steps=1)
    finetune(config)
    # nothing else says of which run it is
    (tmp_path / "out" / "run_settings.json").unlink()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    with pytest.raises(SystemExit) as caught:
        finetune(config, "--output_dir", tmp_path / "new", "--resume_from_checkpoint", checkpoint, *flags)
    assert f"going on from {checkpoint}: {message}" in last_line(capsys, caught)


def test_an_error_within_a_step_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("a mistake in the program")

    monkeypatch.setattr(finetune_llama.AnswerTrainer, "training_step", fail)
    with pytest.raises(ValueError, match="a mistake in the program"):
        finetune(make_config(tmp_path), "--output_dir", tmp_path / "new")


@pytest.mark.parametrize(("width", "height"), [(32, 32), (64, 16)])
def test_4_bit_layers_that_cannot_be_evaluated(width: int, height: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(width, height, quant_type="nf4").to("cpu")
    fitting = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    fitting.support_avx512bf16_for_cpu = True
    model = torch.nn.Sequential(fitting, layer)
    layer.support_avx512bf16_for_cpu = False
    checks.check_four_bit(model)
    layer.support_avx512bf16_for_cpu = True
    with pytest.raises(ValueError, match=f"cannot evaluate 1, for its weight of {height} x {width} is not of whole"):
        checks.check_four_bit(model)


def test_a_4_bit_run_is_refused_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    with pytest.raises(SystemExit) as caught:
        finetune(make_config(tmp_path), "--output_dir", tmp_path / "new", "--load_in_4bit")
    assert "load_in_4bit: on this processor bitsandbytes cannot evaluate" in last_line(capsys, caught)
