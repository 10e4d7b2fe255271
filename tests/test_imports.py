"""Imports go one way, lazy ones included: from a folder to those before it, and between modules without a cycle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dora_peft"
# Each folder or file of the package may import itself and those in the lines above its own.
ORDER = [
    {"reference", "_field_types", "_files", "_own_entries", "_refused_fields", "_row_ranges"},
    {"config", "bases"},
    {"ops"},
    {"norms"},
    {"layers"},
    {"optim", "adapters"},
    {"model"},
    {"plugin"},
    {"__init__", "cli"},
]
ANALYSIS_SEES = {"analysis", "bases", "reference", "_files"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in its file, for types as well."""
    path, found = MODULES[name], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].relative_to(PACKAGE).parts
            parent = ".".join([*folder, *filter(None, [node.module])])
            for alias in node.names:
                child = f"{parent}.{alias.name}".lstrip(".")
                found.add(child if child in MODULES else parent or "__init__")
        else:
            names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            assert not any(n.split(".")[0] == "dora_peft" for n in names), f"{name}: import relatively"
    return found


def level(name: str) -> int:
    top = name.split(".")[0]
    return next(i for i, members in enumerate(ORDER) if top in members)


def test_the_walk_finds_the_package():
    assert len(MODULES) > 40
    assert "ops.choice" in imported("norms.state")


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_what_lies_below(name):
    for other in imported(name):
        if name.split(".")[0] == "analysis":
            assert other.split(".")[0] in ANALYSIS_SEES, f"{name} imports {other}"
        else:
            same = name.split(".")[0] == other.split(".")[0]
            assert same or level(other) < level(name), f"{name} imports {other}"


def test_no_cycles():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in imported(name) - {name}:
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
