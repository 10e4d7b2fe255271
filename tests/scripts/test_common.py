"""What several programs share: what counts as kept for backward, and files that are written whole or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_fixtures import loss_of, make, tiny
from torch import nn

from common import machine
from common.files import replacing
from common.memory import record_saved_bytes, saved_bytes

CPU = torch.device("cpu")


FLOAT = 4


def test_saved_bytes_of_a_sequence() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2)), torch.randn(8, 3)
    # The output of the sigmoid, which is the input of the second layer; x was there before.
    assert saved_bytes(lambda: model(x).sum()) == 8 * 5 * FLOAT


def test_saved_bytes_count_what_a_context_keeps() -> None:
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            # seen by no hook
            ctx.kept = [x.exp()]
            ctx.temporary = x.cos().sum().item()
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.kept[0]

    x = torch.randn(8, 3, requires_grad=True)
    assert saved_bytes(lambda: Keep.apply(x).sum()) == 8 * 3 * FLOAT
    with record_saved_bytes(nn.Identity()) as hooked:
        loss = Keep.apply(x).sum()
    assert sum(hooked.values()) == 0
    loss.backward()


def test_saved_bytes_agree_with_the_hooks_on_lora() -> None:
    """LoRA keeps everything through save_for_backward, so both ways of counting see the same."""
    lora = make("lora", tiny(), dropout=0.1)
    with record_saved_bytes(lora.module) as hooked:
        loss = loss_of(lora)
    loss.backward()
    # the tokens, which the second count leaves out as older than the forward pass
    ids = 2 * 16 * 8
    assert abs(saved_bytes(lambda: loss_of(lora)) - sum(hooked.values())) <= 4 * ids


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(path.parent.iterdir()) == []


def test_the_machine_names_its_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that choose the code of a product, and no others; of a system that says nothing, torch's level alone."""

    def told(text: str) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", lambda *_, **__: text)
            return machine.instruction_sets()

    level = torch.backends.cpu.get_cpu_capability()
    x86 = "processor\t: 0\nflags\t\t: fpu avx avx2 sse4_2 amx_tile avx512_bf16 avx512f\nvmx flags\t: amx_bf16\n"
    assert told(x86) == {"torch": level, "processor": ["avx2", "avx512f", "avx512_bf16", "amx_tile"]}
    assert told("Features\t: fp asimd sve2\n") == {"torch": level, "processor": ["asimd", "sve2"]}
    assert told("") == {"torch": level, "processor": []}


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="the system does not list what its processor has")
def test_what_torch_uses_is_among_the_instruction_sets() -> None:
    found = machine.describe_machine(CPU)["instruction_sets"]
    wanted = {"AVX2": {"avx2"}, "AVX512": {"avx2", "avx512f"}}.get(found["torch"], set())
    assert wanted <= set(found["processor"])
