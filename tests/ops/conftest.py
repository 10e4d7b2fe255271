"""Fixtures of the tests of tensors."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Every fresh buffer is full of NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
