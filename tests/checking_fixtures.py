"""What the tests of the kernels' check share: running it, one check alone, and a kernel that does nothing."""

import torch
from kernel_fixtures import DEVICE

from dora_peft.ops.kernels import checking, selfcheck

HERE = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)


def run(dtype=torch.float32):
    selfcheck.run(HERE, dtype)


def only(monkeypatch, check):
    """Run no other check."""
    monkeypatch.setattr(checking, "_CHECKS", [entry for entry in checking._CHECKS if entry[0] is check])


class Nothing:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *_, **__: None
