"""The analysis as a command: `python -m dora_peft.analysis`."""

import json
import subprocess
import sys

import pytest
from analysis_fixtures import assert_equal, at, config, fit, llama, nudged, trained
from peft import get_peft_model

from dora_peft import analysis
from dora_peft.analysis import DecompositionCallback, correlate, decompose

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


def test_the_command_compares_runs_and_single_folders(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "base")
    dora = get_peft_model(llama(), config("dora", init_lora_weights=True))
    fit(dora, tmp_path / "trained", DecompositionCallback(2), 4, save_strategy="steps", save_steps=2)
    trained("lora").save_pretrained(tmp_path / "lora")
    nudged(llama()).save_pretrained(tmp_path / "full")
    output = tmp_path / "figures" / "pattern.png"
    runs = [str(tmp_path / name) for name in ("trained", "lora", "full")]
    analysis.main([str(tmp_path / "base"), *runs, "--output", str(output), "--modules", "q_proj|v_proj"])

    content = json.loads(output.with_suffix(".json").read_text())
    assert list(content["runs"]) == ["trained", "lora", "full"]
    run = content["runs"]["trained"]
    assert {entry["step"] for entry in run["history"]} == {2, 4}
    assert_equal(at(run["history"], 4), decompose(dora, target="q_proj|v_proj"), rel=1e-12)
    assert list(run["kinds"]) == ["q_proj", "v_proj"]
    expected = correlate(run["history"])
    assert run["correlation"] == pytest.approx(expected._asdict())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("trained"))
    count, r, low, high = (float(part.strip("[],")) for part in line.replace("[", " ").split()[1:])
    assert (count, r, low, high) == pytest.approx((expected.count, *expected[:3]), abs=5.1e-3)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert output.with_name("pattern_trajectories.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{base}", "{missing}"], "no such folder"),
        (["{missing}", "{lora}"], "missing"),
        (["{base}", "{lora}", "--modules", "banana"], "path matches 'banana'"),
        (["{base}", "{lora}", "--modules", "("], "missing \\)"),
        (["{base}", "{lora}", "--model_class", "AutoBanana"], "AutoBanana"),
    ],
)
def test_errors_of_the_command(arguments, message, tmp_path, capsys):
    folders = {"base": tmp_path / "base", "lora": tmp_path / "lora", "missing": tmp_path / "missing"}
    llama().save_pretrained(folders["base"])
    trained("lora").save_pretrained(folders["lora"])
    output = tmp_path / "out" / "pattern.png"
    with pytest.raises(SystemExit):
        analysis.main([part.format(**folders) for part in arguments] + ["--output", str(output)])
    error = capsys.readouterr().err
    assert "error: " in error
    assert message.replace("\\", "") in error
    assert not output.parent.exists()


def test_the_command_starts_without_a_warning():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "dora_peft.analysis", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "python -m dora_peft.analysis BASE ADAPTER..." in result.stdout
