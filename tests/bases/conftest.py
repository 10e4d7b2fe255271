"""Block sizes for the tests of base weights."""

import pytest

from dora_peft.bases import base, opaque


@pytest.fixture(params=["one block", "small blocks"])
def block_bytes(request, monkeypatch):
    """The real block size, in which a small layer is one block, and one that holds two or three of its rows."""
    if request.param == "small blocks":
        for module in (base, opaque):
            monkeypatch.setattr(module, "BLOCK_BYTES", 150)
