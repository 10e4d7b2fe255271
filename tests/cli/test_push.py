"""`dora-peft push`: what it prints, and how it ends."""

import json
import sys

import pytest
from push_fixtures import adapter, export
from typer.testing import CliRunner

from dora_peft import cli
from dora_peft.cli import push

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


def run(*words):
    return CliRunner().invoke(cli.app, ["push", *map(str, words)])


def test_a_dry_run_prints_files_card_and_destination(tmp_path):
    folder = export(tmp_path / "out", "exact")
    said = run(folder, "user/mine", "--dry-run", "--revision", "dev")
    assert said.exit_code == 0, said.output
    lines = said.output.splitlines()
    assert lines[0] == "would push to user/mine (dev):"
    assert any(line.split()[0] == "base/model.safetensors" and line.endswith("KiB") for line in lines)
    assert "| Route | `exact`: " in said.output
    assert "exact up to rounding of W0" in said.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_json(tmp_path):
    said = run(adapter(tmp_path / "adapter"), "user/mine", "--dry-run", "--json")
    found = json.loads(said.output)
    assert found["repository"] == "user/mine"
    assert found["url"] is None
    assert set(found["files"]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert found["nbytes"] == sum(found["files"].values())


def test_what_was_pushed_is_printed_without_the_card():
    done = push.Push("user/mine", "main", {"README.md": 5}, 5, "# The card", ["a note"], "https://hub/commit/1")
    lines = push.lines(done)
    assert lines[0] == "pushed to user/mine (main): https://hub/commit/1"
    assert "1 files, 5 B" in lines
    assert lines[-1] == "a note"
    assert not any("# The card" in line for line in lines)


def test_help_has_an_example():
    said = run("--help")
    assert said.exit_code == 0
    assert "Example: dora-peft push " in said.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/no/such/folder", "user/mine"], "There is no folder '/no/such/folder'."),
        (["FOLDER", "a/b/c"], "'a/b/c' is no repository's name"),
        (["FOLDER", "user/mine"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_goes_wrong_is_one_line_and_status_2(words, said, tmp_path, monkeypatch, capsys):
    folder = adapter(tmp_path / "adapter")
    words = [str(folder) if word == "FOLDER" else word for word in words]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["dora-peft", "push", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
