"""What every test starts from: no network, no telemetry, fixed seeds, and the scripts importable."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before the first import of a Hugging Face library: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import huggingface_hub
import pytest
import torch

if not torch.cuda.is_available():
    # Before the first import of Triton: without a GPU its kernels run in its interpreter, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import set_seed

import dora_peft

# A plugin of pytest may have imported it before, and so with the user's setting.
huggingface_hub.constants.HF_HUB_OFFLINE = True
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
# Their assertions show their values, as those of tests do.
for module in ("bad_input", "checkpoint", "kept_output", "layer", "linear", "model", "parity", "ties"):
    pytest.register_assert_rewrite(f"{module}_fixtures")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; several threads each would only wait for one another.
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--implementation", default="auto", help="run every test that chooses none with this implementation"
    )


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking at what all imports made: 0.4 s for each full collection otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def chosen_implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """As `--implementation` says; tests of one alone say `@pytest.mark.implementation("torch")`."""
    marker = request.node.get_closest_marker("implementation")
    with dora_peft.implementation(marker.args[0] if marker else request.config.getoption("--implementation")):
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Start every test from the same random numbers, whatever ran before it."""
    set_seed(0)


@pytest.fixture(autouse=True)
def no_stale_norm(request: pytest.FixtureRequest) -> Iterator[None]:
    """Recompute the norm at every use in every test, and fail where the cached one was stale.

    Tests of when it is recomputed say `@pytest.mark.cached_norms`.
    """
    if request.node.get_closest_marker("cached_norms"):
        yield
        return
    with dora_peft.checking():
        yield
