"""The fine-tune script from the command line to its files: methods, resuming, two processes, full disk, errors."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from finetune_fixtures import make_config, make_llama
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_peft
import finetune_llama
from finetune import checkpoints

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "finetune_llama.py"
Refused = Callable[[str], contextlib.AbstractContextManager[None]]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Without the time of day or of the run, which differ from run to run.
CURVE_KEYS = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")


def finetune(config: Path, *flags: object) -> None:
    finetune_llama.main([str(config), *map(str, flags)])


def read_curve(output_dir: Path) -> list[dict[str, float]]:
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    curve = [{key: entry[key] for key in CURVE_KEYS if key in entry} for entry in history]
    return [entry for entry in curve if len(entry) > 1]


def subprocess_environment(tmp_path: Path) -> dict[str, str]:
    paths = {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    return os.environ | paths | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("method", ["dora", "lora", "peft_dora", "full"])
def test_every_method(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path)
    finetune(config, "--method", method, "--max_steps", 12, "--merge", "--eval_steps", 6, "--packing", method == "lora")
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert f"{method}: " in printed
    assert "parameters are trained" in printed
    assert " backwards:[[ " in printed
    losses = [entry["loss"] for entry in read_curve(out) if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert (out / "loss.png").read_bytes().startswith(PNG_SIGNATURE)
    results = json.loads((out / "eval_results.json").read_text(encoding="utf-8"))
    assert f"eval_loss {results['eval_loss']:.4f}" in printed
    assert "tokenizer.json" in {path.name for path in out.iterdir()}
    assert not list(tmp_path.glob(".*"))

    prompt = torch.tensor([[5, 6, 7]])
    if method == "full":
        assert AutoModelForCausalLM.from_pretrained(out)(prompt).logits.isfinite().all()
        return
    saved = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved.get("use_dora", False) == (method != "lora")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, out).eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert merged.config.use_cache
    torch.testing.assert_close(merged(prompt).logits, adapted(prompt).logits, atol=1e-5, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(out / "merged").eos_token == "<|im_end|>"


def test_dora_options_reach_the_adapter(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    flags = ["--detach_norm", "false", "--lora_dropout", "0.1", "--dropout_mode", "paper", "--target_modules", "q_proj"]
    finetune(config, *flags, "--magnitude_only_modules", "up_proj", "--use_rslora", "--max_steps", 1)
    saved = dora_peft.DoraConfig.from_pretrained(tmp_path / "out")
    assert (saved.r, saved.lora_alpha, saved.lora_dropout) == (2, 4, 0.1)
    assert (saved.detach_norm, saved.dropout_mode, saved.use_rslora) == (False, "paper", True)
    names = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in load_file(tmp_path / "out/adapter_model.safetensors")}
    assert names == {"q_proj", "up_proj"}


def test_magnitudes_have_their_rate_and_no_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = []
    create = finetune_llama.AnswerTrainer.create_optimizer
    monkeypatch.setattr(
        finetune_llama.AnswerTrainer,
        "create_optimizer",
        lambda self, model=None: optimizers.append(create(self, model)) or self.optimizer,
    )
    finetune(make_config(tmp_path), "--weight_decay", 0.1, "--lr_magnitude", 0.25, "--max_steps", 1)
    groups = optimizers[0].param_groups
    assert [(group["weight_decay"], group["initial_lr"]) for group in groups] == [(0.1, 5e-3), (0.0, 0.25)]
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"])


def test_gradient_checkpointing_and_accumulation_leave_the_losses(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    finetune(config, "--output_dir", tmp_path / "a")
    flags = ["--gradient_checkpointing", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    finetune(config, "--output_dir", tmp_path / "b", *flags)
    for one, other in zip(read_curve(tmp_path / "a"), read_curve(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_eval_loss_is_the_mean_over_answer_tokens(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_steps=1)
    losses = []
    for number, flags in enumerate([[], ["--per_device_eval_batch_size", 4], ["--packing", "--max_length", 48]]):
        # A step too small to matter: packing changes the training batch.
        finetune(config, "--output_dir", tmp_path / str(number), "--learning_rate", 1e-12, *flags)
        losses.append(json.loads((tmp_path / str(number) / "eval_results.json").read_text())["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_killed_run_resumes_with_the_same_curve(tmp_path: Path) -> None:
    config = make_config(tmp_path, lora_dropout=0.1, max_steps=10, save_steps=3, eval_steps=5)
    finetune(config, "--output_dir", tmp_path / "whole")
    killed = tmp_path / "killed"
    # SIGKILL in the eighth step: after the checkpoint of the sixth, with nothing flushed or cleaned up.
    program = f"""
import os, signal, sys, transformers
sys.path.insert(0, {str(SCRIPT.parent)!r})
import finetune_llama
step = finetune_llama.AnswerTrainer.training_step
calls = []
def killing_step(*args, **kwargs):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)
finetune_llama.AnswerTrainer.training_step = killing_step
finetune_llama.main([{str(config)!r}, "--output_dir", {str(killed)!r}])
"""
    process = subprocess.run([sys.executable, "-c", program], env=subprocess_environment(tmp_path), capture_output=True)
    assert process.returncode == -9, process.stderr.decode()
    assert [path.name for path in checkpoints.list_checkpoints(killed)] == ["checkpoint-3", "checkpoint-6"]
    # As if the kill had come while a further checkpoint was written.
    shutil.copytree(killed / "checkpoint-6", killed / "checkpoint-9")
    (killed / "checkpoint-9" / "trainer_state.json").write_text('{"log_hist', encoding="utf-8")

    finetune(config, "--output_dir", killed, "--resume_from_checkpoint")
    whole, resumed = read_curve(tmp_path / "whole"), read_curve(killed)
    assert len(whole) == 12
    for one, other in zip(whole, resumed, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", killed))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# The wrapper that outlives the group lets the process hang now and then, so count those that do.
COUNTING_PROGRAM = f"""
import gc, sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {str(SCRIPT.parent)!r})
import finetune_llama
destroy, made, build = dist.destroy_process_group, [], DistributedDataParallel.__init__
def building(self, *args, **kwargs):
    made.append(1)
    build(self, *args, **kwargs)
def counting(*args):
    left = [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]
    print(f"closed with {{len(left)}} of {{len(made)}} wrappers", flush=True)
    destroy(*args)
DistributedDataParallel.__init__, dist.destroy_process_group = building, counting
finetune_llama.main()
"""


@pytest.mark.distributed
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(COUNTING_PROGRAM, encoding="utf-8")
    config = make_config(tmp_path, max_steps=4)
    finetune(config, "--output_dir", tmp_path / "one")
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    launcher += [str(ROOT / "configs/accelerate/cpu_2_processes.yaml")]
    flags = ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two")]
    process = subprocess.run(
        [sys.executable, *launcher, str(program), str(config), *flags],
        env=subprocess_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("closed with 0 of 1 wrappers") == 2, process.stdout
    assert process.stdout.count("parameters are trained") == 1
    one, two = read_curve(tmp_path / "one"), read_curve(tmp_path / "two")
    assert len(one) == 5
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    with_one, with_two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(with_two, with_one, rtol=1e-3, atol=1e-5)


def test_resume_choices(tmp_path: Path, refused: Refused) -> None:
    config = make_config(tmp_path, save_steps=1, max_steps=1)
    # Nothing to resume from: the same command starts a run and continues one.
    finetune(config, "--resume_from_checkpoint")
    with refused(r"holds checkpoint-1 of an earlier run; continue it with --resume_from_checkpoint true"):
        finetune(config)
    finetune(config, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1", "--max_steps", 2)
    with refused(r"checkpoint-7 is no complete checkpoint; .*checkpoint-1"):
        finetune(config, "--resume_from_checkpoint", tmp_path / "checkpoint-7")


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let writes fail beyond 20 kB a file, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_no_half_written_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    config = make_config(tmp_path, save_steps=1, max_steps=2)
    save = torch.save

    def full_in_the_second_step(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_in_the_second_step)
    with refused(r"checkpoint-2: the checkpoint could not be saved .*No space left.*Free some space"):
        finetune(config)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    monkeypatch.undo()
    finetune(config, "--resume_from_checkpoint")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_full_disk_leaves_no_half_written_adapter(tmp_path: Path, small_files: None) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "a.bin").write_bytes(b"earlier")

    def save() -> None:
        with checkpoints.staged(target) as folder:
            folder.mkdir()
            (folder / "a.bin").write_bytes(b"new")
            (folder / "b.bin").write_bytes(b"x" * 30_000)

    with pytest.raises(OSError, match=r"adapter: could not be saved .*; nothing was left half-written"):
        save()
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["adapter"]
    assert (target / "a.bin").read_bytes() == b"earlier"


def test_options_without_meaning_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(make_config(tmp_path), "--method", "lora", "--lr_magnitude", 0.1, "--max_steps", 1)
    assert "note: lr_magnitude has no meaning for method lora and is not used" in capsys.readouterr().out


def test_wrong_field_ends_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune(make_config(tmp_path), "--lernrate", 1)
    assert "unknown field 'lernrate'" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "adamw_torch"])
def test_optimizers_leave_the_magnitudes_undecayed(
    tmp_path: Path, optimizer: str, recwarn: pytest.WarningsRecorder
) -> None:
    # dora_peft warns of any optimizer that decays them
    finetune(make_config(tmp_path), "--optim", optimizer, "--weight_decay", 0.1, "--max_steps", 2)
    assert not [warning for warning in recwarn if "magnitudes" in str(warning.message)]
    losses = [entry["loss"] for entry in read_curve(tmp_path / "out") if "loss" in entry]
    assert len(losses) == 2


def test_an_optimizer_with_groups_of_its_own_takes_no_rate_for_magnitudes(tmp_path: Path, refused: Refused) -> None:
    pytest.importorskip("lomo_optim")
    with refused("lr_magnitude: the optimizer adalomo makes its own groups; leave it out"):
        finetune(make_config(tmp_path), "--optim", "adalomo", "--lr_magnitude", 0.1)


def test_an_optimizer_that_cannot_be_made_is_one_line(tmp_path: Path, refused: Refused) -> None:
    # neither its package nor its target modules are there
    with refused("optim: .*[Gg]a[Ll]ore"):
        finetune(make_config(tmp_path), "--optim", "galore_adamw")


def test_compiled_training_has_the_losses_of_eager_training(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    finetune(config, "--output_dir", tmp_path / "eager")
    # without the minutes that inductor takes
    flags = ["--torch_compile", "--torch_compile_backend", "aot_eager"]
    finetune(config, "--output_dir", tmp_path / "compiled", *flags)
    for one, other in zip(read_curve(tmp_path / "eager"), read_curve(tmp_path / "compiled"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_load_in_4bit_trains_over_nf4(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    models = []
    build = finetune_llama.build_model
    monkeypatch.setattr(finetune_llama, "build_model", lambda *args: models.append(build(*args)) or models[-1])
    config = make_config(tmp_path)
    # bitsandbytes repacks weights for some CPUs, in whole blocks of 64
    make_llama(tmp_path / "model", width=128)
    finetune(config, "--load_in_4bit", "--method", method, "--max_steps", 6)
    layers = [module for module in models[0].modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}
    losses = [entry["loss"] for entry in read_curve(tmp_path / "out") if "loss" in entry]
    assert losses[-1] < losses[0]
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["base_model_name_or_path"] == str(tmp_path / "model")


def test_the_best_model_is_the_one_that_is_measured(tmp_path: Path) -> None:
    # the losses fall, so that the highest is not the last
    flags = ["--load_best_model_at_end", "--greater_is_better", "true", "--max_steps", 4]
    finetune(make_config(tmp_path), "--eval_steps", 1, "--save_steps", 1, *flags)
    losses = [entry["eval_loss"] for entry in read_curve(tmp_path / "out") if "eval_loss" in entry]
    assert max(losses) > losses[3]
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text(encoding="utf-8"))
    assert results["eval_loss"] == pytest.approx(max(losses), rel=1e-6)


def test_the_docstring_names_real_files() -> None:
    assert "configs/smollm2_135m.yaml" in finetune_llama.__doc__
    assert yaml.safe_load((ROOT / "configs/smollm2_135m.yaml").read_text(encoding="utf-8"))["r"] == 8
