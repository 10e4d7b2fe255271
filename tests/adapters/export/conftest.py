"""What several tests of exports begin with."""

import pytest
from format_fixtures import llama, saved


@pytest.fixture
def folders(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter")
    return tmp_path
