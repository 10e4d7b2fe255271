"""Options of the fine-tune script: every YAML, overrides, and one clear error for each kind of mistake."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from finetune.arguments import (
    ABOVE,
    AT_LEAST,
    BELOW,
    TRAINING_DEFAULTS,
    DataArguments,
    ModelArguments,
    training_values,
)
from finetune.model import initialisation, nf4
from finetune.options import GROUPS, USUAL_TRAINING, build_parser

ROOT = Path(__file__).parents[2]
# tests/test_vl_bart.py reads the others
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if not p.name.startswith("vl_bart_"))
REQUIRED = {"model_name_or_path": "model", "dataset": "data", "output_dir": "out"}


Refused = Callable[[str], contextlib.AbstractContextManager[None]]


def parse(*argv: object) -> Any:
    """All options in one namespace."""
    model, data, args, _ = build_parser("test").parse([str(word) for word in argv])
    return SimpleNamespace(**vars(args) | vars(model) | vars(data))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(REQUIRED | {"learning_rate": "1e-4"}), encoding="utf-8")
    return path


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 9


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model, _, _, _ = build_parser("test").parse([str(path)])
    assert model.unused_options() == []
    assert f"configs/{path.name}" in path.read_text(encoding="utf-8")


def test_the_papers_settings() -> None:
    rates = {path.stem: parse(path).learning_rate for path in CONFIGS if path.stem.rsplit("_r", 1)[-1] in ("16", "32")}
    assert rates == {
        "llama_7b_r16": 2e-4,
        "llama_7b_r32": 1e-4,
        "llama_13b_r16": 3e-4,
        "llama_13b_r32": 2e-4,
        "llama2_7b_r16": 2e-4,
        "llama2_7b_r32": 2e-4,
        "llama3_8b_r16": 1e-4,
        "llama3_8b_r32": 1e-4,
    }


def test_accelerate_configs_are_accepted() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    paths = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
    assert len(paths) == 3
    for path in paths:
        assert load_config_from_file(str(path)).num_processes >= 2


def test_command_line_overrides_the_file(config_file: Path) -> None:
    config = parse(config_file, "--r", 4, "--learning_rate", "3e-5", "--packing", "--bf16", "no", "--output_dir", 2024)
    assert (config.r, config.learning_rate, config.packing, config.bf16) == (4, 3e-5, True, False)
    assert config.output_dir == "2024"


def test_lists_and_null_on_the_command_line(config_file: Path) -> None:
    assert parse(config_file, "--target_modules", "q_proj", "v_proj").target_modules == ["q_proj", "v_proj"]
    assert parse(config_file, "--target_modules", "q_proj").target_modules == ["q_proj"]
    assert parse(config_file, "--target_modules", r".*\.(q|v)_proj").target_modules == r".*\.(q|v)_proj"
    assert parse(config_file, "--gguf_file", "null").gguf_file is None
    assert parse(config_file, "--save_total_limit", "null").save_total_limit is None
    # no option of Trainer's can be None here
    assert parse(config_file, "--save_steps", "null").save_strategy == "no"
    assert parse(config_file, "--report_to", "null").report_to == []
    assert parse(config_file, "--report_to", "tensorboard", "wandb").report_to == ["tensorboard", "wandb"]


def test_numbers_without_a_dot_in_yaml(config_file: Path) -> None:
    assert parse(config_file).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], r"command line: unknown field 'learning_rat', did you mean learning_rate\?"),
        (["--xyzzy", "1"], "unknown field 'xyzzy'.*--help"),
        (["--r", "0"], "r: expected at least 1, found 0"),
        (["--r", "2.5"], "command line: r: expected a whole number, found '2.5'"),
        (["--r", "true"], "r: expected a whole number, found 'true'"),
        (["--lora_dropout", "1"], "lora_dropout: expected less than 1"),
        (["--lora_dropout", "-0.1"], "lora_dropout: expected at least 0"),
        (["--learning_rate", "fast"], "learning_rate: expected a finite number, found 'fast'"),
        (["--learning_rate", "nan"], "learning_rate: expected a finite number, found 'nan'"),
        (["--learning_rate", "0"], "learning_rate: expected more than 0"),
        (["--packing", "maybe"], "packing: .*maybe"),
        (
            ["--method", "dorra"],
            r"expected one of dora, lora, peft_dora, full, found 'dorra'\. Did you mean dora\?",
        ),
        (["--optim", "adamw_torc"], r"optim: expected one of .*, found 'adamw_torc'\. Did you mean adamw_torch\?"),
        (["--dtype", "bf16"], "dtype: expected one of auto, float32, bfloat16, float16, found 'bf16'"),
        (["--max_steps", "0"], "max_steps: expected -1 or at least 1"),
        (["--eval_size", "5", "--eval_dataset", "x"], "exclude each other"),
        (["--dtype", "float16", "--method", "full"], "method full cannot train float16"),
        (["--load_in_4bit", "--method", "full"], "method full cannot train 4-bit weights"),
        (["--bf16", "--fp16"], "At most one of fp16 and bf16"),
        (["--deepspeed", "no/such/file.json"], "[Dd]eep[Ss]peed"),
        (["--accelerator_config", '{"xyzzy": 1}'], "xyzzy"),
        (["--lr_scheduler_kwargs", "{broken"], "property name"),
        (["--lr_scheduler_kwargs", "x"], "lr_scheduler_kwargs: expected a mapping such as .*, found 'x'"),
        (["--gradient_checkpointing_kwargs", "x"], "gradient_checkpointing_kwargs: expected a mapping"),
        (["--adam_beta1", "2"], "adam_beta1: expected less than 1, found 2.0"),
        (["--adam_beta2", "-1"], "adam_beta2: expected at least 0"),
        (["--adam_epsilon", "-1"], "adam_epsilon: expected at least 0"),
        (["--dataloader_num_workers", "-2"], "dataloader_num_workers: expected at least 0"),
        (["--neftune_noise_alpha", "-5"], "neftune_noise_alpha: expected at least 0"),
        (["--eval_accumulation_steps", "0"], "eval_accumulation_steps: expected at least 1"),
        (["--target_modules", "("], r"target_modules: no regular expression: missing \), .*, found '\('"),
        (["--exclude_modules", "(a"], "exclude_modules: no regular expression"),
        (["--magnitude_only_modules", "*"], "magnitude_only_modules: no regular expression"),
        (["--liger_kernel_config", "rope"], "liger_kernel_config: expected dict, found 'rope'"),
        (["--debug", "everything"], "debug: expected DebugOption, found 'everything'"),
        (["stray"], "unexpected 'stray'"),
    ],
)
def test_wrong_options(config_file: Path, flags: list[str], message: str, refused: Refused) -> None:
    with refused(message):
        parse(config_file, *flags)


def test_a_wrong_option_is_one_line_with_status_2(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(config_file, "--r", "many")
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_alfa: 3\n", r"config.yaml: unknown field 'lora_alfa', did you mean lora_alpha\?"),
        ("r: 2.5\n", "config.yaml: r: expected a whole number, found '2.5'"),
        ("r: [1, 2]\n", "config.yaml: r: expected one value, found a list"),
        ("dataset: {a: 1}\n", "config.yaml: dataset: expected one value, found a mapping"),
        ("target_modules: []\n", "config.yaml: target_modules: expected at least one value"),
        ("- 1\n", "expected lines of `field: value`"),
        ("a: [", "not valid YAML"),
        ("r: 2\n", "config.yaml: missing model_name_or_path, dataset, output_dir; add it there or pass"),
        ("model_name_or_path: null\n", "missing model_name_or_path"),
    ],
)
def test_broken_yaml(config_file: Path, text: str, message: str, refused: Refused) -> None:
    config_file.write_text(text, encoding="utf-8")
    with refused(message):
        parse(config_file)


def test_missing_yaml(tmp_path: Path, refused: Refused) -> None:
    with refused("no such configuration file"):
        parse(tmp_path / "none.yaml")


def test_missing_gguf_file(config_file: Path, tmp_path: Path, refused: Refused) -> None:
    with refused(r"gguf_file: no file a.gguf in the folder"):
        parse(config_file, "--model_name_or_path", tmp_path, "--gguf_file", "a.gguf")


def test_every_value_of_yaml_arrives(config_file: Path) -> None:
    values = {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": "lm_head",
        "init_lora_weights": False,
        "use_rslora": True,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "adam_beta2": 0.98,
        "report_to": ["tensorboard"],
        "eval_steps": None,
        "output_dir": 2024,
        "optim": "sgd",
        "liger_kernel_config": {"rope": False},
        "parallelism_config": {"dp_replicate_size": 2},
        "debug": ["underflow_overflow"],
    }
    config_file.write_text(yaml.safe_dump(REQUIRED | values), encoding="utf-8")
    config = parse(config_file)
    assert config.target_modules == ["q_proj", "v_proj"]
    assert (config.exclude_modules, initialisation(config.init_lora_weights)) == (["lm_head"], False)
    assert (config.use_rslora, config.lr_scheduler_kwargs, config.adam_beta2) == (True, {"num_cycles": 2}, 0.98)
    assert (config.report_to, config.eval_steps, config.output_dir) == (["tensorboard"], None, "2024")
    assert (config.optim, config.liger_kernel_config) == ("sgd", {"rope": False})
    assert (config.parallelism_config.dp_replicate_size, config.debug) == (2, ["underflow_overflow"])


def test_no_file_is_needed() -> None:
    flags = [word for name, value in REQUIRED.items() for word in (f"--{name}", value)]
    assert parse(*flags, "--method", "lora").method == "lora"


def test_hyphens_and_no_are_understood_as_everywhere(config_file: Path) -> None:
    assert parse(config_file, "--learning-rate", 0.5).learning_rate == 0.5
    assert parse(config_file, "--no_detach_norm").detach_norm is False


def test_the_switch_fsdp_may_say_true_or_false(config_file: Path) -> None:
    alone = parse(config_file, "--fsdp").fsdp
    assert alone
    assert parse(config_file, "--fsdp", "true").fsdp == parse(config_file, "--fsdp", "True").fsdp == alone
    assert parse(config_file, "--fsdp", "false").fsdp == parse(config_file).fsdp != alone


def test_steps_choose_the_strategy(config_file: Path) -> None:
    config = parse(config_file, "--eval_size", 2, "--eval_steps", 5, "--save_steps", 7)
    assert (config.eval_strategy, config.eval_steps, config.save_strategy, config.save_steps) == (
        "steps",
        5,
        "steps",
        7,
    )
    config = parse(config_file, "--eval_size", 2, "--eval_steps", 5, "--eval_strategy", "epoch")
    assert (config.eval_strategy, config.save_strategy) == ("epoch", "no")


@pytest.mark.parametrize("flag", ["--gradient_checkpointing", "--activation_checkpointing"])
def test_checkpointing_under_both_names(config_file: Path, flag: str) -> None:
    if flag[2:] not in {option.name for option in dataclasses.fields(TrainingArguments)}:
        pytest.skip("a later name of transformers")
    config = parse(config_file, flag)
    assert config.gradient_checkpointing is True
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_a_machine_without_accelerator_uses_the_cpu(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert training_values({"use_cpu": False})["use_cpu"] is True
    # which would leave DeepSpeed out
    assert training_values({"deepspeed": "zero2.json"})["use_cpu"] is False
    assert parse(config_file, "--bf16").dataloader_pin_memory is False


def test_every_range_and_default_is_of_an_option() -> None:
    names = {
        option.name
        for kind in (ModelArguments, DataArguments, TrainingArguments)
        for option in dataclasses.fields(kind)
    }
    assert set(AT_LEAST) | set(ABOVE) | set(BELOW) | set(TRAINING_DEFAULTS) <= names


def test_options_without_meaning_for_the_method() -> None:
    assert ModelArguments(model_name_or_path="a", method="lora", lr_magnitude=1e-3, r=4).unused_options() == [
        "lr_magnitude"
    ]
    assert ModelArguments(model_name_or_path="a", method="full", r=4).unused_options() == ["r"]


def test_help_is_grouped_and_starts_with_what_matters() -> None:
    text = build_parser("what it does").format_help()
    places = [text.index(f"\n{title}:\n") for title in GROUPS]
    assert places == sorted(places)
    places.append(len(text))
    groups = {
        title: re.findall(r"^  --(\w+)", text[start:end], re.MULTILINE)
        for title, start, end in zip(GROUPS, places, places[1:], strict=False)
    }
    assert groups["model"][0] == "model_name_or_path"
    assert groups["adapter"][:3] == ["method", "r", "lora_alpha"]
    assert groups["data"][0] == "dataset"
    assert groups["training"][0] == "output_dir"
    training = {option.name for option in dataclasses.fields(TrainingArguments)}
    assert set(groups["training"]) == training & set(USUAL_TRAINING)
    assert set(groups[GROUPS[-1]]) == training - set(USUAL_TRAINING)
    ours = [option.name for kind in (ModelArguments, DataArguments) for option in dataclasses.fields(kind)]
    assert sorted(groups["model"] + groups["adapter"] + groups["data"]) == sorted(ours)


def test_help_lists_choices_that_are_few_and_names_the_kind_of_the_rest() -> None:
    text = " ".join(build_parser("").format_help().split())
    for shown in (
        "--method {dora,lora,peft_dora,full} ",
        "--dtype {auto,float32,bfloat16,float16} ",
        "--eval_strategy {no,steps,epoch} ",
        # too many to list
        "--optim NAME ",
        "--packing [BOOL] ",
        "--r INT ",
        "--model_name_or_path TEXT ",
    ):
        assert shown in text


@pytest.mark.parametrize(
    ("dtype", "products"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_the_4_bit_base_is_quantised_as_qlora_does(dtype: str, products: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    found = nf4(ModelArguments(model_name_or_path="a", dtype=dtype)).to_dict()
    assert found["load_in_4bit"] is True
    assert found["bnb_4bit_quant_type"] == "nf4"
    assert found["bnb_4bit_use_double_quant"] is True
    assert found["bnb_4bit_compute_dtype"] == str(products).removeprefix("torch.")


def test_help_says_what_is_required_and_the_defaults() -> None:
    text = " ".join(build_parser("").format_help().split())
    assert len(re.findall(r"\(required\)", text)) == 3
    assert "--learning_rate FLOAT The initial learning rate for the optimizer. (default: 0.0002)" in text
