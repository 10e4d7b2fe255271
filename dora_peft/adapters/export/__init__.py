"""Adapters for servers that do not know DoRA, with the loss stated.

export.py       the three routes under one function: routes.py each of them, record.py what it wrote, in numbers
adapted.py      the base's files with adapters over them: loading.py brings the adapters, names.py says which keys a
                parameter is made of, pieces.py what is made anew, codes/ what quantised weights are, requantised.py
                what bitsandbytes makes of a base
exact.py        rows c W0 and a plain LoRA: splitting.py takes W' apart and measures what rounding costs,
                fingerprint.py knows the base again; exact_gguf.py the same over a .gguf, which gguf_checkpoint.py
                reads and gguf_record.py compares with what an adapter's folder says
lora.py         the nearest plain LoRA of one rank: lowrank.py the approximation, changes.py of what, text.py,
                calibration.py and comparison.py by a text
merged.py       W' in the base's files
plain.py        a plain LoRA that every server reads the same; gguf.py llama.cpp's file
writing.py      a checkpoint, so that it can be interrupted: shards.py, manifest.py, companions.py
"""

from __future__ import annotations

from .export import ROUTES, export
from .record import Record
from .requantised import NAMED

__all__ = ["NAMED", "ROUTES", "Record", "export"]
