"""The figures are written whole, in every format, whatever the records."""

import io

import pytest
import torch
from analysis_fixtures import records

from dora_peft.analysis.plots import draw_correlations, draw_pattern, draw_trajectories, layer_kind


def test_layer_kind():
    assert layer_kind("model.layers.3.self_attn.q_proj") == "q_proj"
    assert layer_kind("linear") == "linear"


def histories():
    x = torch.rand(6, 3, dtype=torch.float64) * 1e-4
    return {"LoRA": records(x, 20 * x), "DoRA": records(2 * x, 1 - x)}


def test_figures_are_written_whole(tmp_path):
    buffer = io.BytesIO()
    draw_pattern(histories(), "title", buffer)
    assert buffer.getvalue().startswith(b"\x89PNG")
    for draw in (draw_pattern, draw_trajectories):
        draw(histories(), "title", tmp_path / "figures" / f"{draw.__name__}.svg")
        text = (tmp_path / "figures" / f"{draw.__name__}.svg").read_text()
        assert "</svg>" in text
    draw_correlations({"all": histories(), "some": histories()}, "title", tmp_path / "figures" / "correlations.svg")
    assert "</svg>" in (tmp_path / "figures" / "correlations.svg").read_text()
    assert len(list((tmp_path / "figures").iterdir())) == 3
    # no line, no logarithm, and no warning
    still = records(torch.zeros(2, 2), torch.ones(2, 2))
    for draw in (draw_pattern, draw_trajectories):
        draw({"magnitudes alone": still}, "title", buffer)
    draw_correlations({"all": {"magnitudes alone": still}}, "title", buffer)
    with pytest.raises(ValueError, match="found none"):
        draw_pattern({}, "title", buffer)


def test_every_kind_of_layer_has_a_panel(tmp_path):
    """Seven of them take two lines of four, for dM and for dD, and each shows its steps where nothing stands below."""
    history = [
        {"step": step, "module": f"layers.0.{kind}", "magnitude": step * 1e-3, "direction": step * 1e-4}
        for step in (10, 20)
        for kind in "abcdefg"
    ]
    draw_trajectories({"DoRA": history}, "title", tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert [text.count(f"<!-- {kind} -->") for kind in "abcdefg"] == [2] * 7
    assert text.count("<!-- optimizer step -->") == 8
