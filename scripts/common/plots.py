"""What all plots have in common: one colour and one name for each method, and files that are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"lora": "tab:gray", "peft_dora": "tab:orange", "dora": "tab:blue", "full": "tab:green"}
# Of what is no method of its own: a bound, a base model.
OTHER_COLOR = "lightgray"
LABELS = {"lora": "PEFT LoRA", "peft_dora": "PEFT use_dora", "dora": "dora_peft", "full": "full fine-tuning"}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to `path`, which never holds half of it."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
