"""Options of the fine-tune script: every YAML, overrides, and one clear error for each kind of mistake."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from finetune.config import FinetuneConfig, convert
from finetune.options import build_parser, parse_config

ROOT = Path(__file__).parents[2]
# tests/test_vl_bart.py reads the others
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if not p.name.startswith("vl_bart_"))
REQUIRED = {"model_name_or_path": "model", "dataset": "data", "output_dir": "out"}


def parse(*argv: object) -> FinetuneConfig:
    return parse_config([str(word) for word in argv], build_parser("test"))[0]


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
    config = parse(path)
    assert config.unused_options() == []
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
    assert parse(config_file, "--target_modules", "[q_proj, v_proj]").target_modules == ["q_proj", "v_proj"]
    assert parse(config_file, "--target_modules", "q_proj").target_modules == ["q_proj"]
    assert parse(config_file, "--target_modules", r".*\.(q|v)_proj").target_modules == r".*\.(q|v)_proj"
    assert parse(config_file, "--gguf_file", "null").gguf_file is None


def test_numbers_without_a_dot_in_yaml(config_file: Path) -> None:
    assert parse(config_file).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], r"command line: unknown field 'learning_rat', did you mean learning_rate\?"),
        (["--xyzzy", "1"], "unknown field 'xyzzy'.*--help"),
        (["--r", "0"], "r: expected at least 1, found 0"),
        (["--r", "2.5"], "r: expected a whole number, found 2.5"),
        (["--r", "true"], "r: expected a whole number, found True"),
        (["--lora_dropout", "1"], "lora_dropout: expected less than 1"),
        (["--lora_dropout", "-0.1"], "lora_dropout: expected at least 0"),
        (["--learning_rate", "fast"], "learning_rate: expected a finite number, found 'fast'"),
        (["--learning_rate", ".nan"], "learning_rate: expected a finite number, found nan"),
        (["--learning_rate", "0"], "learning_rate: expected more than 0"),
        (["--packing", "maybe"], "packing: expected true or false, found 'maybe'"),
        (
            ["--method", "dorra"],
            r"expected one of dora, lora, peft_dora, full, found 'dorra'\. Did you mean dora\?",
        ),
        (["--dtype", "bf16"], "dtype: expected one of auto, float32, bfloat16, float16, found 'bf16'"),
        (["--target_modules", "[1, 2]"], "target_modules: expected a list of texts or a text"),
        (["--max_steps", "0"], "max_steps: expected -1 or at least 1"),
        (["--eval_steps", "5"], "eval_steps needs evaluation data"),
        (["--eval_size", "5", "--eval_dataset", "x"], "exclude each other"),
        (["--push_to_hub"], "push_to_hub needs hub_model_id"),
        (["--dtype", "float16", "--method", "full"], "method full cannot train float16"),
        (["--dtype", "float16", "--bf16"], "exclude each other"),
        (["stray"], "unexpected 'stray'"),
    ],
)
def test_wrong_options(config_file: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(config_file, *flags)


def test_unknown_field_in_yaml(config_file: Path) -> None:
    config_file.write_text("lora_alfa: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.yaml: unknown field 'lora_alfa', did you mean lora_alpha\?"):
        parse(config_file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected lines of `field: value`"),
        ("a: [", "not valid YAML"),
        ("r: 2\n", "missing model_name_or_path"),
    ],
)
def test_broken_yaml(config_file: Path, text: str, message: str) -> None:
    config_file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse(config_file)


def test_missing_yaml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such configuration file"):
        parse(tmp_path / "none.yaml")


def test_missing_gguf_file(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gguf_file: no file a.gguf in the folder"):
        parse(config_file, "--model_name_or_path", tmp_path, "--gguf_file", "a.gguf")


def test_output_dir_is_a_file(config_file: Path) -> None:
    with pytest.raises(ValueError, match="output_dir: expected a folder, found the file"):
        parse(config_file, "--output_dir", config_file)


def test_every_default_has_its_type() -> None:
    hints = FinetuneConfig.__annotations__
    defaults = [option for option in dataclasses.fields(FinetuneConfig) if option.default is not dataclasses.MISSING]
    assert defaults
    for option in defaults:
        assert convert(option.name, option.default, hints[option.name]) == option.default


def test_options_without_meaning_for_the_method() -> None:
    config = FinetuneConfig(**REQUIRED, method="lora", lr_magnitude=1e-3, r=4)
    assert config.unused_options() == ["lr_magnitude"]
    assert FinetuneConfig(**REQUIRED, method="full", r=4).unused_options() == ["r"]
