"""The command `dora-peft`: what it prints, and how it ends."""

import json
import sys

import pytest
from format_fixtures import llama, saved
from typer.testing import CliRunner

from dora_peft import cli

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("saved") / "adapter", target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    target = tmp_path_factory.mktemp("base") / "llama"
    llama().save_pretrained(target)
    return target


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_info(folder, base):
    said = run("info", folder, "--base", base)
    assert said.exit_code == 0, said.output
    assert "format    peft" in said.output
    assert "down_proj  2 x [24, 40], rank 4, alpha 12, A float32, B float32, m float32, mean |m /" in said.output
    found = json.loads(run("info", folder, "--json").output)
    assert len(found["modules"]) == 4


def test_doctor_ends_by_what_it_finds(folder, base, tmp_path):
    said = run("doctor", folder, "--base", base)
    assert (said.exit_code, said.output) == (0, "nothing found\n")
    other = saved(tmp_path / "other", target_modules=["q_proj"])
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    said = run("doctor", other, "--base", base)
    assert said.exit_code == 1
    assert said.output.startswith("not-called-dora: ")
    assert "to mend" in said.output
    assert json.loads(run("doctor", other, "--base", base, "--json").output)[0]["name"] == "not-called-dora"


def test_convert(folder, tmp_path):
    said = run("convert", folder, tmp_path / "out", "--to", "mlx", "--dry-run")
    assert said.exit_code == 0, said.output
    assert "would write" in said.output
    assert "free there" in said.output
    assert not (tmp_path / "out").exists()
    said = run("convert", folder, tmp_path / "out", "--to", "mlx")
    assert said.output.startswith("peft -> mlx: 4 modules")
    assert json.loads(run("info", tmp_path / "out", "--json").output)["format"] == "mlx"
    said = run("convert", folder, tmp_path / "out", "--to", "nvlabs", "--force", "--dtype", "bf16", "--json")
    assert json.loads(said.output)["target"] == "nvlabs"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info", "/no/such/adapter"], "There is no folder or file '/no/such/adapter'."),
        (["convert", "FOLDER", "OUT", "--to", "gguf"], "There is no format 'gguf'"),
        (["convert", "FOLDER", "OUT", "--to", "mlx", "--dtype", "int8"], "--dtype: expected one of fp32"),
        (["convert", "FOLDER", "FOLDER", "--to", "mlx"], "--force"),
    ],
)
def test_what_goes_wrong_is_one_line_and_status_2(folder, tmp_path, words, said, monkeypatch, capsys):
    words = [{"FOLDER": str(folder), "OUT": str(tmp_path / "out")}.get(word, word) for word in words]
    monkeypatch.setattr(sys, "argv", ["dora-peft", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "out").exists()
