"""All verbs stand under one name, each with help that shows an example, and end as a shell expects."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dora_peft import cli

VERBS = [command.name for command in cli.app.registered_commands]


def test_each_file_of_the_folder_is_a_verb():
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert set(VERBS) == files - {"__init__", "app", "common"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb):
    said = CliRunner().invoke(cli.app, [verb, "--help"])
    assert said.exit_code == 0
    assert f"Example: dora-peft {verb} " in said.output


def test_without_a_verb_help_is_shown():
    said = CliRunner().invoke(cli.app, [])
    assert all(verb in said.output for verb in VERBS)


@pytest.mark.parametrize(("words", "status"), [(["info", "/none"], 2), (["--help"], 0)])
def test_main_ends_with_a_status(words, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dora-peft", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == (status == 2)


def test_the_program_that_is_installed():
    """As a shell calls it, for its name and its status."""
    program = Path(sys.executable).with_name("dora-peft")
    if not program.exists():
        pytest.skip("the package is imported from its folder, and not installed")
    done = subprocess.run([program, "info", "/none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: There is no folder or file '/none'." in done.stderr
    assert "Traceback" not in done.stderr
