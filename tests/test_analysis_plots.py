"""The figures are written whole, in every format, whatever the records."""

import io

import pytest
import torch
from analysis_fixtures import records

from dora_peft.analysis_plots import draw_pattern, draw_trajectories, layer_kind


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
    assert len(list((tmp_path / "figures").iterdir())) == 2
    still = records(torch.zeros(2, 2), torch.ones(2, 2))  # no line, no logarithm, and no warning
    for draw in (draw_pattern, draw_trajectories):
        draw({"magnitudes alone": still}, "title", buffer)
    with pytest.raises(ValueError, match="found none"):
        draw_pattern({}, "title", buffer)
