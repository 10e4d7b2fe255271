"""What configs/vl_bart_*.yaml hold, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass
class Settings:
    """What configs/vl_bart_*.yaml hold.

    Attributes:
        model: A pretrained BART, folder or Hub id; None trains a small one on the questions of `backbone_pattern`.
        dataset: The folder of the data, under `--data`.
        learning_rates: The grid of each method; DoRA's serves with and without detaching.
        pattern: Regular expression of the questions to adapt to, the whole of them.
        steps: Optimizer steps of each run; None leaves it to `epochs`.
        max_test: Test questions to answer, the first ones; None for all.
    """

    model: str | None
    dataset: str
    visual_dim: int
    visual_tokens: int
    r: int
    lora_alpha: float
    target_modules: list[str]
    learning_rates: dict[str, list[float]]
    batch: int
    seeds: list[int]
    lora_dropout: float = 0.0
    train_visual_embedding: bool = False
    warmup: float = 0.1
    steps: int | None = None
    epochs: float | None = None
    max_test: int | None = None
    pattern: str = ".*"
    backbone_pattern: str | None = None
    backbone_steps: int = 0
    backbone_batch: int = 64
    backbone_learning_rate: float = 1e-3
    d_model: int = 128
    layers: int = 2


def load_settings(path: Path) -> Settings:
    """Read a YAML file of settings; a seed that is given twice counts once.

    Raises:
        ValueError: there is no such file, it is no YAML, a field is unknown or missing, or the fields contradict each
            other.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected settings as in configs/vl_bart_easy_vqa.yaml.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected fields such as `r: 16`, found {type(values).__name__}.")
    known = {field.name for field in fields(Settings)}
    if unknown := sorted(map(str, set(values) - known)):
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; expected some of {', '.join(sorted(known))}.")
    try:
        settings = Settings(**values)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    if (settings.steps is None) == (settings.epochs is None):
        raise ValueError(f"{path}: expected one of steps and epochs, found {settings.steps} and {settings.epochs}.")
    if settings.model is None and not (settings.backbone_pattern and settings.backbone_steps):
        raise ValueError(f"{path}: without a model, expected backbone_pattern and backbone_steps to train one.")
    if not settings.seeds:
        raise ValueError(f"{path}: seeds: expected at least one.")
    if len({len(settings.learning_rates.get(method, ())) for method in ("lora", "dora", "full")}) != 1:
        raise ValueError(f"{path}: learning_rates: expected as many for lora as for dora and full.")
    rates = [rate for grid in settings.learning_rates.values() for rate in grid]
    if unfit := [rate for rate in rates if not isinstance(rate, float)]:
        # YAML 1.1 reads 1e-3 as text
        raise ValueError(f"{path}: learning_rates: expected numbers such as 1.0e-3, with a point, found {unfit[0]!r}.")
    if settings.model is not None and not settings.train_visual_embedding:
        raise ValueError(
            f"{path}: train_visual_embedding: expected true with model {settings.model}, whose projection of "
            "pictures is new and would stay random."
        )
    settings.seeds = list(dict.fromkeys(settings.seeds))
    return settings


def toy(settings: Settings) -> Settings:
    """The same at toy size, with easy-vqa and a backbone of our own: nothing is fetched from the Hub."""
    small = load_settings(CONFIGS / "vl_bart_easy_vqa.yaml")
    names = ("model", "dataset", "visual_dim", "visual_tokens", "pattern", "backbone_pattern", "backbone_learning_rate")
    return replace(
        settings, **{name: getattr(small, name) for name in names}, r=min(settings.r, small.r), steps=2, epochs=None,
        backbone_steps=2, backbone_batch=4, batch=4, d_model=16, layers=1, max_test=20,
    )  # fmt: skip
