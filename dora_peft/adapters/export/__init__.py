"""Adapters for servers that do not know DoRA, with the loss stated.

export.py       the three routes under one function; record.py what it wrote, in numbers
adapted.py      the base's files with adapters over them; names.py which keys a parameter is made of, requantised.py
                what bitsandbytes makes of a base
exact.py        rows c W0 and a plain LoRA; splitting.py takes W' apart and measures what rounding costs
lora.py         the nearest plain LoRA of one rank: lowrank.py the approximation, changes.py of what, calibration.py
                and comparison.py by a text
merged.py       W' in the base's files
plain.py        a plain LoRA that every server reads the same; gguf.py llama.cpp's file
writing.py      a checkpoint, so that it can be interrupted: shards.py, manifest.py, companions.py
"""

from __future__ import annotations

from .export import ROUTES, export
from .record import Record
from .requantised import NAMED

__all__ = ["NAMED", "ROUTES", "Record", "export"]
