"""A fine-tune run's YAML file and command line, read into its configuration."""

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.config import FinetuneConfig, check_known, kinds_of


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        ValueError: if the file is missing, is no mapping, or holds a field that does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file; `configs/` holds examples.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines of `field: value`, found {type(values).__name__}.")
    check_known([str(name) for name in values], str(path))
    return values


def build_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the positional `config` and one `--field` per option; absent flags leave no attribute behind."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="YAML file of the fields below")
    for option in dataclasses.fields(FinetuneConfig):
        default = "required" if option.default is dataclasses.MISSING else f"default {option.default}"
        help_text = f"{option.metadata['help']} ({default})".replace("%", "%%")
        parser.add_argument(f"--{option.name}", nargs="*", metavar="VALUE", default=argparse.SUPPRESS, help=help_text)
    return parser


def read_flag(words: list[str], hint: Any) -> Any:
    """The value of one flag, read as YAML: no word is true, several words are a list."""
    if len(words) != 1:
        return words or True
    try:
        value = yaml.safe_load(words[0])
    except yaml.YAMLError:
        return words[0]
    kinds = kinds_of(hint)
    is_meant = type(value) in kinds or (isinstance(value, list) and list[str] in kinds)
    # A folder may be called 2024.
    return words[0] if str in kinds and not is_meant else value


def parse_config(
    argv: Sequence[str] | None, parser: argparse.ArgumentParser
) -> tuple[FinetuneConfig, argparse.Namespace]:
    """Read the YAML file and the flags of a command line.

    Args:
        argv: the words after the program's name; None takes them from `sys.argv`.
        parser: from `build_parser`, with any further flags of the script.

    Returns:
        The configuration, and the namespace with the script's own flags.

    Raises:
        ValueError: naming the field that is unknown, missing, of the wrong type or out of range.
    """
    namespace, unknown = parser.parse_known_args(argv)
    unknown_flags = [word[2:].split("=")[0] for word in unknown if word.startswith("--")]
    check_known(unknown_flags, "command line")
    if unknown:
        raise ValueError(f"command line: unexpected {unknown[0]!r}; overrides are written --field value.")
    fields = dataclasses.fields(FinetuneConfig)
    values = load_yaml(namespace.config)
    hints = typing.get_type_hints(FinetuneConfig)
    flags = {name: words for name, words in vars(namespace).items() if name in hints}
    values |= {name: read_flag(words, hints[name]) for name, words in flags.items()}
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ValueError(
            f"{namespace.config}: missing {', '.join(missing)}; add it there or pass --{missing[0]} VALUE."
        )
    return FinetuneConfig(**values), namespace
