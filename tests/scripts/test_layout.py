"""The folder scripts/: commands on top, what they share below, and no command that imports another."""

import ast
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMANDS = sorted(SCRIPTS.glob("*.py"))
MODULES = sorted(SCRIPTS.glob("*/*.py"))
NAMES = {path.stem for path in COMMANDS}


def imported(tree: ast.AST) -> set[str]:
    """The first parts of the modules that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.partition(".")[0])
    return found


def test_there_are_commands_and_modules() -> None:
    assert len(NAMES) >= 15
    folders = {path.parent.name for path in MODULES}
    assert folders == {
        "benchmarks",
        "common",
        "engines",
        "finetune",
        "gpu",
        "prepare",
        "quiet",
        "reproduction",
        "vl_bart",
    }


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_a_file_on_top_is_a_command(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert f"scripts/{path.name}" in (ast.get_docstring(tree) or ""), "the docstring lacks the command line"
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert isinstance(tree.body[-1], ast.If)
    assert ast.unparse(tree.body[-1].test) == "__name__ == '__main__'"


@pytest.mark.parametrize("path", COMMANDS + MODULES, ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_no_command_is_imported(path: Path) -> None:
    assert not imported(ast.parse(path.read_text(encoding="utf-8"))) & NAMES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_a_file_below_is_no_command(path: Path) -> None:
    assert "__main__" not in path.read_text(encoding="utf-8")


def test_what_all_share_imports_no_other_folder() -> None:
    folders = {path.parent.name for path in MODULES} - {"common"}
    for path in SCRIPTS.glob("common/*.py"):
        assert not imported(ast.parse(path.read_text(encoding="utf-8"))) & folders


def test_pre_commit_checks_with_the_pinned_linter() -> None:
    hooks = yaml.safe_load((SCRIPTS.parent / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (revision,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit")]
    pinned = (SCRIPTS / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ruff=={revision.removeprefix('v')}" in pinned
