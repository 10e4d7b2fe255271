"""Accuracy at the paper's size, on a toy model: the scripts that a user would run, one after the other."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from finetune_fixtures import make_llama, make_words, write_jsonl

from reproduction import commonsense as reproduce_commonsense
from reproduction import report as report
from reproduction import verdicts as verdicts
from reproduction.common import Options, Plan


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_llama(folder / "smollm2")
    for task in ("cmudict", "cities"):
        (folder / task).mkdir()
        write_jsonl(folder / task / "train.jsonl", make_words(20))
        write_jsonl(folder / task / "test.jsonl", make_words(30)[20:])
    return folder


def run_in_this_process(command):
    """As `subprocess.run` does, without the seconds that a process takes to import torch."""
    assert command[0] == sys.executable
    script = Path(command[1])
    assert script.is_file()
    importlib.import_module(script.stem).main(command[2:])
    return subprocess.CompletedProcess(command, 0)


def test_commonsense(data, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce_commonsense, "subprocess", SimpleNamespace(run=run_in_this_process))
    folder = tmp_path / "configs"
    folder.mkdir()
    settings = {
        "model_name_or_path": str(data / "smollm2"), "dtype": "float32", "r": 2, "lora_alpha": 4,
        "format": "instruction", "dataset": "replaced", "output_dir": "replaced", "max_length": 256, "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2, "dropout_mode": "branch",
    }  # fmt: skip
    (folder / "llama_7b_r32.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setattr(reproduce_commonsense, "CONFIGS", folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tests = tmp_path / "commonsense" / "test"
    tests.mkdir(parents=True)
    record = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true", "answer": "true"}
    (tmp_path / "commonsense" / "train.json").write_text(json.dumps([record] * 4), encoding="utf-8")
    answers = ("true", "solution1", "answer1", "ending1", "option1", "answer1", "answer1", "answer1")
    names = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
    for name, answer in zip(names, answers, strict=True):
        fitting = record | {"answer": answer, "output": f"the correct answer is {answer}"}
        (tests / f"{name}.json").write_text(json.dumps([fitting]), encoding="utf-8")
    options, plan = Options(size="full", data=tmp_path, results=tmp_path / "results"), Plan(ranks=(3,), seeds=(0,))
    reproduce_commonsense.run(options, plan)
    content = json.loads((tmp_path / "results/accuracy_full.json").read_text(encoding="utf-8"))
    assert set(content["runs"]) == {"commonsense lora r=3 seed=0", "commonsense dora r=3 seed=0"}
    assert all(set(run["tasks"]) == set(names) for run in content["runs"].values())
    (config,) = tmp_path.glob("outputs/reproduce/commonsense_dora_r3_seed0_*/adapter_config.json")
    assert json.loads(config.read_text(encoding="utf-8"))["r"] == 3
    # the cost of detaching asks for the memory before it trains anything
    with pytest.raises(ValueError, match=r"memory_full\.json: not there yet"):
        reproduce_commonsense.run_detach(options, plan)
    totals = {"reference": 1.0, "dora": 1.0, "dora_not_detached": 1.0}
    memory = {"summary": {"llama": {"setting": "16 x 256", "total_mib": {"16 x 256": totals}}}}
    options.path("memory").write_text(json.dumps(memory), encoding="utf-8")
    with pytest.raises(ValueError, match="at 16 x 256, found none of reference_not_detached, which did not fit"):
        reproduce_commonsense.run_detach(options, plan)
    totals["reference_not_detached"] = 2.0
    options.path("memory").write_text(json.dumps(memory), encoding="utf-8")
    reproduce_commonsense.run_detach(options, plan)
    content = json.loads((tmp_path / "results/detach_full.json").read_text(encoding="utf-8"))
    assert content["runs"].keys() == {f"commonsense {method} r=3 seed=0" for method in ("dora", "dora_not_detached")}
    assert content["summary"]["total_mib"] == totals
    (config,) = tmp_path.glob("outputs/reproduce/commonsense_dora_not_detached_r3_seed0_*/adapter_config.json")
    assert '"detach_norm": false' in config.read_text(encoding="utf-8")
    # other data or another configuration are other runs
    with (tests / "boolq.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="expected runs of the model and data with digest"):
        reproduce_commonsense.run(options, plan)
    settings = reproduce_commonsense.settings_of(options, plan)
    (folder / "llama_7b_r32.yaml").write_text(yaml.safe_dump(settings | {"r": 4}), encoding="utf-8")
    assert reproduce_commonsense.settings_of(options, plan) != settings
