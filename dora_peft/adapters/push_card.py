"""The model card of what goes to the Hub: an adapter, or an export with its route, its errors and its command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from ..config import DoraConfig
from . import card as cards
from .export.record import Record
from .formats import UnreadableError
from .formats.checkpoint import CONFIG
from .info import Info
from .push_files import CARD, Content

_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A tag that PEFT writes, with the base's name after it.
_OF_BASE = "base_model:adapter:"
# How many of an export's modules the card lists, the worst ones.
_MOST = 5
_ROUTES = {
    "exact": "a base whose rows are c W0, and a plain LoRA c s B A over it: DoRA in every server that knows LoRA",
    "lora": "the nearest plain LoRA of one rank, over the base as it is",
    "merged": "the base with the adapter merged into its weights",
}
_NUMBERS = {
    "error_over_update": "Error / update",
    "share_lost": "Share of rows whose c is lost",
    "scale_share": "Share of (c - 1) W0 in the update",
    "rank": "Rank",
}


def card_of(folder: Path, content: Content, repository: str, base: str | None) -> ModelCard:
    """The card: the folder's own README.md with the package's section added or replaced, or a new one.

    Args:
        folder: What is pushed.
        content: What it is.
        repository: Where to.
        base: What its base model is called there, if it is another name than the files have.

    Raises:
        UnreadableError: The README.md cannot be read.
    """
    card = _own(folder)
    if content.record is not None:
        named = base or on_hub(content.record.base)
        _name_base(card, named)
        model = (folder / CONFIG).is_file() or content.parts == ("base",)
        _name_library(card, "transformers" if model else "peft")
        section = _export_section(content, model, named, repository)
        cards.complete(card, section, *(("dora",) if model else ("dora", "lora")))
        return card
    assert content.info is not None
    # PEFT names the base of a model that was not loaded from a folder in the card alone
    known = content.info.base or card.data.get("base_model")
    named = base or on_hub(known)
    _name_base(card, named)
    _name_library(card, content.info.format)
    with_magnitude = any(len(module.dtypes) == 3 for module in content.info.modules)
    if with_magnitude and content.info.format == "peft":
        config = DoraConfig.from_pretrained(str(folder))
        section = cards.adapter_section(config, named or Path(known or "").name, repository)
    else:
        section = _other_section(content.info, named or _last(known), with_magnitude)
    cards.complete(card, section, *(("dora", "lora") if with_magnitude else ("lora",)))
    return card


def on_hub(name: str | None) -> str | None:
    """The repository that a base is called by, None if it is a folder's name."""
    repository = (name or "").partition("@")[0]
    return repository if _ON_HUB.fullmatch(repository) and not Path(repository).exists() else None


def _own(folder: Path) -> ModelCard:
    path = folder / CARD
    if not path.is_file():
        return ModelCard("---\n{}\n---\n")
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:
        # of YAML's many kinds
        said = " ".join(str(error).split())[:120]
        raise UnreadableError(
            f"Cannot read '{path}': expected a model card, found: {said}. Mend or remove it."
        ) from error


def _name_base(card: ModelCard, named: str | None) -> None:
    """Name the base, or leave it out: a folder of this machine is no name for others, and the Hub refuses it."""
    named = named or on_hub(card.data.get("base_model"))
    tags = [tag for tag in card.data.get("tags") or [] if not str(tag).startswith(_OF_BASE)]
    card.data["tags"] = (
        [*tags, f"{_OF_BASE}{named}"] if named and len(tags) < len(card.data.get("tags") or []) else tags
    )
    if named is not None:
        card.data["base_model"] = named
    else:
        card.data.pop("base_model", None)


def _name_library(card: ModelCard, name: str) -> None:
    if card.data.get("library_name") is None:
        card.data["library_name"] = name


def _export_section(content: Content, model: bool, named: str | None, repository: str) -> str:
    record = content.record
    assert record is not None
    base = named or _last(record.base)
    rows = [
        ("Route", f"`{record.route}`: {_ROUTES[record.route]}"),
        ("Base model", _cell(base)),
        ("Adapters", ", ".join(_cell(_last(one)) for one in record.adapters)),
        ("dtype", _cell(record.dtype)),
        ("How exact", _cell(record.statement)),
        ("Modules", str(len(record.modules))),
        *(
            (f"{_NUMBERS.get(name, _cell(name.replace('_', ' ')))}, all", f"{n:.4g}")
            for name, n in record.totals.items()
        ),
    ]
    texts = [
        "## DoRA adapter, exported",
        _table(("", ""), rows),
        _serving(record, content.parts, model, base, repository),
    ]
    worst = sorted(record.modules, key=lambda path: -record.modules[path].get("error_over_update", 0.0))[:_MOST]
    worst = [path for path in worst if record.modules[path].get("error_over_update")]
    names = list(dict.fromkeys(name for path in worst for name in record.modules[path] if name in _NUMBERS))
    if worst and names:
        heads = ("Module", *(_NUMBERS[name] for name in names))
        lines = [(f"`{_cell(path)}`", *(_number(record.modules[path].get(name)) for name in names)) for path in worst]
        texts += ["The modules with the largest errors:", _table(heads, lines)]
    said = [*(f"Warning: {one}." for one in record.warnings()), *record.notes]
    if said:
        texts.append("\n".join(f"- {_plain(one)}" for one in said))
    if record.command is not None:
        texts += ["Made by:", _code(record.command)]
    return "\n\n".join(texts)


def _serving(record: Record, parts: tuple[str, ...], model: bool, base: str, repository: str) -> str:
    rank = int(record.totals.get("rank", 0))
    if record.route == "merged":
        return f'A model like any other: `from_pretrained("{repository}")`.'
    if record.route == "lora":
        limit = f" vLLM needs `--max-lora-rank {rank}`." if rank > 16 else ""
        return f"Serve it over {_cell(base)} as a plain LoRA; PEFT, vLLM, SGLang and llama.cpp read it the same.{limit}"
    if model and parts:
        return "`base/` is a model like any other: the adapter trained magnitudes alone, and no LoRA is left."
    if parts:
        return (
            "Serve `adapter/` over `base/`, and over no other base: on the original weights it is another adapter, "
            "which nothing would report."
        )
    other = "the LoRA" if model else "the base"
    return f"Half of an export: use it with {other} of the same export, and with no other one."


def _other_section(found: Info, base: str, with_magnitude: bool) -> str:
    rows = [
        ("Format", f"`{found.format}`"),
        ("Method", "DoRA" if with_magnitude else "LoRA, without magnitudes"),
        ("Base model", _cell(base)),
        ("Modules", str(len(found.modules))),
        ("Ranks", ", ".join(str(rank) for rank in sorted({module.rank for module in found.modules}))),
    ]
    return "\n\n".join([f"## {'DoRA' if with_magnitude else 'LoRA'} adapter", _table(("", ""), rows)])


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _last(name: str | None) -> str:
    """The last part of a folder's name: the rest is this machine's."""
    return Path(name).name if name else "not named"


def _plain(text: str) -> str:
    """A text of a file as text: on one line, and neither HTML nor an end of the section."""
    return " ".join(text.split()).replace("<", "&lt;")


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("`", "'")


def _code(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}bash\n{' '.join(text.split())}\n{fence}"
