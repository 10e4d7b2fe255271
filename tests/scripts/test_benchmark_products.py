"""Which library multiplies faster: the command runs and stores what it printed."""

import json
import sys

import pytest
import torch

import benchmark_products
from dora_peft.ops.torch_names import onednn_linear


@pytest.mark.skipif(onednn_linear() is None, reason="this torch has no oneDNN product")
def test_both_directions_are_compared_and_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_products, "SHAPES", ((8, 16, 4),))
    monkeypatch.setattr(sys, "argv", ["benchmark_products.py", "--rounds", "1", "--results", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        benchmark_products.main()
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("products_cpu_*.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    (row,) = report["results"]
    assert (row["out"], row["in"], row["tokens"]) == (8, 16, 4)
    printed = capsys.readouterr().out
    assert f"{row['forward']:7.3f}" in printed
    assert f"{row['backward']:8.3f}" in printed
