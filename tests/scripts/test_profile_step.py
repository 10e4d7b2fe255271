"""Where a step's time goes: one run at toy size, and which operation is of which kind."""

import json
from pathlib import Path

import pytest

import profile_step
from benchmarks import price_page


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile_step.main(["--settings=toy", "--steps=1", f"--results={tmp_path}"])
    stored = json.loads((tmp_path / "profile_cpu.json").read_text(encoding="utf-8"))
    found = stored["profiles"]["toy"]
    assert found["ms"].keys() == {"lora", "dora"}
    for ms in found["ms"].values():
        assert list(ms) == [*profile_step.KINDS, profile_step.REST]
        assert all(value > 0 for kind, value in ms.items() if kind not in ("copies", "the layer's own Python"))
    own = {one: ms["the layer's own Python"] for one, ms in found["ms"].items()}
    assert own["lora"] == 0 < own["dora"]
    table = price_page.profile_table("toy", found)
    assert table in capsys.readouterr().out
    total = [sum(ms.values()) for ms in found["ms"].values()]
    assert table.splitlines()[-1].startswith(f"| in all | {total[0]:.1f} | {total[1]:.1f} |")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("aten::mul", "other operations"),
        ("aten::native_batch_norm_backward", "other operations"),
        ("aten::copy_", "copies"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_LinearBackward", "the layer's own Python"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("autograd::engine::evaluate_function: MmBackward0", "other operations"),
        ("something", profile_step.REST),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert profile_step.kind_of(name) == kind
