"""The command `dora-peft`: one file per verb, each a thin layer over a function of `dora_peft.adapters`."""

from .app import app, main

__all__ = ["app", "main"]
