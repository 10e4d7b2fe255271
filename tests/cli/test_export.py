"""`dora-peft export` and `push`: what they print, and how they end."""

import json
import sys

import pytest
from format_fixtures import llama, saved
from typer.testing import CliRunner

from dora_peft import cli


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    llama().save_pretrained(root / "base")
    saved(root / "adapter", target_modules=["q_proj", "down_proj"])
    saved(root / "second", r=2, target_modules=["q_proj"])
    return root


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_exact(folders, tmp_path, monkeypatch):
    words = ["export", folders / "adapter", "--base", folders / "base", "--out", tmp_path / "out", "--as", "exact"]
    monkeypatch.setattr(sys, "argv", ["dora-peft", *map(str, words)])
    said = run(*words, "--dry-run")
    assert said.exit_code == 0, said.output
    assert said.output.startswith(f"would write {tmp_path / 'out'}: 4 modules in float16\nexact up to rounding of W0")
    assert not (tmp_path / "out").exists()
    said = run(*words)
    assert said.output.startswith(f"wrote {tmp_path / 'out'}: 4 modules in float16\nexact up to rounding of W0")
    assert "error over update" in said.output
    assert "share lost" in said.output
    record = json.loads((tmp_path / "out" / "adapter" / "dora_export.json").read_text())
    for name in ("q_proj", "down_proj"):
        errors = [own["error_over_update"] for path, own in record["modules"].items() if path.endswith(name)]
        (line,) = [line for line in said.output.splitlines() if line.lstrip().startswith(f"{name} ")]
        assert f"2 modules: error / update {min(errors):.2g}" in line
        assert f"{max(errors):.2g}" in line
        assert "% of rows" in line
    found = json.loads((tmp_path / "out" / "adapter" / "dora_export.json").read_text())
    assert found["command"].startswith("dora-peft export ")
    assert "--as exact" in found["command"]
    assert run(*words).exit_code == 1
    assert run(*words, "--force").exit_code == 0


def test_several_adapters_and_json(folders, tmp_path):
    said = run(
        "export", folders / "adapter", "--adapter", folders / "second", "--base", folders / "base", "--out",
        tmp_path / "out", "--as", "merged", "--json",
    )  # fmt: skip
    record = json.loads(said.output)
    assert record["adapters"] == [str(folders / "adapter"), str(folders / "second")]
    assert len(record["modules"]) == 4


def test_lora_warns_of_what_it_loses(folders, tmp_path):
    said = run("export", folders / "adapter", "--base", folders / "base", "--out", tmp_path / "out", "--as", "lora",
               "--rank", "1")  # fmt: skip
    assert "approximate: the nearest plain LoRA of rank 1; the part (c - 1) W0" in said.output
    assert "warning: error / update is above 1% in 4 of 4 modules" in said.output


def test_push_says_what_it_would_do(folders, tmp_path):
    run("export", folders / "adapter", "--base", folders / "base", "--out", tmp_path / "out", "--as", "exact")
    said = run("push", tmp_path / "out" / "adapter", "user/name", "--base", "user/base", "--dry-run")
    assert said.exit_code == 0, said.output
    assert said.output.startswith("would push to user/name")
    assert "adapter_model.safetensors" in said.output
    assert "exact up to rounding of W0" in said.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "/none", "--base", "BASE", "--out", "OUT", "--as", "exact"], "There is no folder or file '/none'"),
        (["export", "ADAPTER", "--base", "/none", "--out", "OUT", "--as", "exact"], "'/none'"),
        (
            ["export", "ADAPTER", "--base", "BASE", "--out", "OUT", "--as", "fast"],
            "expected one of exact, lora, merged",
        ),
        (["export", "ADAPTER", "--base", "BASE", "--out", "BASE", "--as", "merged", "--force"], "holds the base model"),
        (["export", "ADAPTER", "--base", "BASE", "--out", "ADAPTER", "--as", "merged"], "is there already"),
        (["export", "ADAPTER", "--base", "BASE", "--out", "OUT", "--as", "lora", "--rank", "9"], "choose 16"),
        (["export", "ADAPTER", "--base", "BASE", "--out", "OUT", "--as", "lora", "--error", "1e-9"], "reached"),
        (["export", "ADAPTER", "--base", "BASE", "--out", "OUT", "--as", "exact", "--dtype", "int8"], "--dtype"),
        (["push", "/none", "user/name"], "/none"),
    ],
)
def test_what_goes_wrong_is_one_line_and_status_2(folders, tmp_path, words, said, monkeypatch, capsys):
    places = {"ADAPTER": folders / "adapter", "BASE": folders / "base", "OUT": tmp_path / "out"}
    words = [str(places.get(word, word)) for word in words]
    monkeypatch.setattr(sys, "argv", ["dora-peft", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert said in line
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in folders.iterdir()) == ["adapter", "base", "second"]
