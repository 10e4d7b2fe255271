"""The benchmark of merging into files at toy size: it compares what it says it compares."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import benchmark_merge
from benchmark_merge import check_bytes, check_tensors, config_of, main, shards_of


def test_sizes_are_about_those_asked_for():
    for gigabytes in (0.05, 4.0, 8.0):
        shards = shards_of(config_of(gigabytes), 0.1 * gigabytes * 1e9)
        nbytes = [sum(2 * torch.Size(shape).numel() for shape in shard.values()) for shard in shards]
        assert sum(nbytes) == pytest.approx(gigabytes * 1e9, rel=0.05)
        assert 9 <= len(shards) <= 12
        assert max(nbytes) <= 0.101 * gigabytes * 1e9


@pytest.mark.slow
def test_it_merges_kills_and_compares(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_merge, "config_of", lambda gigabytes: config_of(0.001))
    main(["--gigabytes", "0.001", "--shard-gigabytes", "0.001", "--folder", str(tmp_path), "--results", str(tmp_path)])
    stored = json.loads((tmp_path / "merge.json").read_text())
    found = stored["merge"]
    # embedding, head, norm, and one layer of nine
    assert found["equal_tensors"] == 12
    assert 0 < found["resumed"]["finished_before"] < stored["setting"]["files"]
    assert found["equal_files"] > stored["setting"]["files"]
    for name in ("files", "loaded", "resumed"):
        assert found[name]["peak_mib"] >= found[name]["before_mib"] > 0
        assert found[name]["time_s"] > 0
    assert "same bytes" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["merge.json"]


@pytest.mark.parametrize("change", ["a bit", "a file more", "a file less", "longer"])
def test_a_difference_ends_it(tmp_path, change):
    (tmp_path / "one").mkdir()
    save_file({"x": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "one" / "model.safetensors")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    assert check_bytes(tmp_path / "one", tmp_path / "other") == check_tensors(tmp_path / "one", tmp_path / "other") == 1
    path = tmp_path / "other" / "model.safetensors"
    if change == "a bit":
        # equal as numbers
        save_file({"x": -load_file(path)["x"]}, path)
        with pytest.raises(SystemExit, match="'x' differs"):
            check_tensors(tmp_path / "one", tmp_path / "other")
    elif change == "a file more":
        save_file({"y": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "other" / "more.safetensors")
        with pytest.raises(SystemExit, match="other tensors"):
            check_tensors(tmp_path / "one", tmp_path / "other")
    elif change == "a file less":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(SystemExit, match=r"differs|other files"):
        check_bytes(tmp_path / "one", tmp_path / "other")
