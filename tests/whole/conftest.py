"""Fixtures of the tests of the whole."""

import pytest
from bad_input_fixtures import adapted


@pytest.fixture
def saved(tmp_path):
    """The folder of an intact adapter."""
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
