"""The comparison with other tools' software: what is made for them, and that a wrong output is seen."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import check_formats
from common.formats_table import ABOUT, WAYS, formats_table
from dora_peft.adapters import FORMATS, doctor


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    check_formats.main(["make", str(folder)])
    return folder


def test_an_adapter_in_every_format(made):
    assert all(
        (made / name / "adapter_config.json").is_file() for name in ("peft", "nvlabs", "mlx", "torchtune", "trtllm")
    )
    assert all(any((made / name).glob("*.safetensors")) for name in FORMATS)
    assert doctor(made / "peft", made / "llama") == []


@pytest.mark.parametrize("wrong", [None, "read", "made"])
@pytest.mark.parametrize("tool", ["lycoris", "torchtune"])
def test_outputs_of_a_tool_are_compared(made, tmp_path, tool, wrong, capsys):
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    base = check_formats.Base(folder / "llama")
    outputs = check_formats.expected(check_formats._read(folder / tool, base), folder)
    kept = {"logits": outputs["logits"]} if tool == "torchtune" else {k: y for k, y in outputs.items() if k != "logits"}
    for way in ("read", "made"):
        save_file(
            {k: y * (1.0001 if way == wrong else 1) for k, y in kept.items()}, folder / f"{tool}_{way}.safetensors"
        )
    shutil.copytree(folder / tool, folder / f"{tool}_made")
    (folder / f"{tool}.json").write_text(json.dumps({tool: "1.2"}))
    if wrong is None:
        check_formats.main(["compare", str(folder), "--results", str(tmp_path)])
    else:
        with pytest.raises(SystemExit, match="1"):
            check_formats.main(["compare", str(folder), "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "formats.json").read_text())["rows"]
    assert rows[tool]["versions"] == {tool: "1.2"}
    for way, name in zip(WAYS, ("read", "made"), strict=True):
        assert (rows[tool][way] > check_formats.BOUND) is (name == wrong)
    assert f"| {tool} 1.2 |" in capsys.readouterr().out


def test_missing_outputs_are_seen(made, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    base = check_formats.Base(folder / "llama")
    outputs = check_formats.expected(check_formats._read(folder / "lycoris", base), folder)
    first = next(iter(load_file(folder / "inputs.safetensors")))
    with pytest.raises(SystemExit, match="missing or too many"):
        check_formats.error({k: y for k, y in outputs.items() if k not in ("logits", first)}, outputs)


def test_the_table_has_every_format():
    assert ABOUT.keys() == FORMATS.keys()
    table = formats_table({"mlx": {"versions": {"mlx-lm": "9"}, WAYS[0]: 2.4e-7, WAYS[1]: torch.pi}})
    assert "| mlx-lm 9 | 2e-07 | 3e+00 |" in table
    assert table.count("restatement") == len(FORMATS) - 1
