"""Fixtures of the tests of tensors."""

from dataclasses import dataclass, field

import pytest
import torch

from dora_peft.ops import choice, selfcheck


@pytest.fixture
def poisoned_memory():
    """Every fresh buffer is full of NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@dataclass
class StubbedGpu:
    """What torch says of a GPU, and what becomes of the kernels' check on it, for machines without one.

    Attributes:
        failure: What the check raises, by dtype or for all.
        runs: The devices and dtypes of the checks so far.
    """

    name: str = "A GPU"
    capability: tuple[int, int] = (9, 0)
    capturing: bool = False
    lost: bool = False
    failure: BaseException | dict[torch.dtype, Exception] | None = None
    runs: list[tuple[torch.device, torch.dtype]] = field(default_factory=list)

    def run(self, device: torch.device, dtype: torch.dtype) -> None:
        self.runs.append((device, dtype))
        failure = self.failure.get(dtype) if isinstance(self.failure, dict) else self.failure
        if failure is not None:
            raise failure

    def synchronize(self, device: torch.device) -> None:
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

    def forget(self) -> None:
        """Begin another process, as far as this package can tell."""
        self.runs.clear()
        for known in (choice._answers, choice._postponed, selfcheck._known, selfcheck._warned):
            known.clear()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that nobody has asked about, in a process with no cache and no setting."""
    stub = StubbedGpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: stub.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: stub.capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stub.capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", stub.synchronize)
    monkeypatch.setattr(choice, "_answers", {})
    monkeypatch.setattr(choice, "_postponed", set())
    monkeypatch.setattr(selfcheck, "_known", {})
    monkeypatch.setattr(selfcheck, "_warned", set())
    for variable in ("TRITON_INTERPRET", "TRITON_CACHE_DIR", selfcheck.VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from dora_peft.ops.kernels import selfcheck as kernels_check

    monkeypatch.setattr(kernels_check, "run", stub.run)
    return stub
