"""The example of reinforcement learning: its reward, and both methods from the same start at toy size."""

import json

import pytest

import grpo_example
from dora_peft import DoraConfig


@pytest.mark.parametrize(
    ("found", "expected", "rewarded"),
    [
        (" W IH N D OW", " W IH N D OW", 1.0),
        ("W  IH N D", " W IH N D OW", 0.8),
        ("", " W IH", 0.0),
        ("K K K K K K", " W IH", 0.0),
        ("W IH N D OW N", " W IH N D OW", 0.8),
    ],
)
def test_reward_is_the_share_of_right_phonemes(found, expected, rewarded):
    assert grpo_example.reward([found], expected=[expected], prompts=["ignored"]) == [pytest.approx(rewarded)]


def test_options_that_cannot_be(capsys):
    for words in (["--generations", "1"], ["--seeds", "0,x"], ["--steps", "0"]):
        with pytest.raises(SystemExit):
            grpo_example.read_options(words)
        assert f"{words[0]}: " in capsys.readouterr().err


def test_both_methods_have_equal_settings():
    options = grpo_example.read_options(["--rank", "3"])
    lora, dora = (grpo_example.adapter(kind, options) for kind in grpo_example.METHODS.values())
    assert isinstance(dora, DoraConfig)
    assert not isinstance(lora, DoraConfig)
    for name in ("r", "lora_alpha", "target_modules", "lora_dropout", "init_lora_weights", "task_type"):
        assert getattr(lora, name) == getattr(dora, name)


@pytest.mark.filterwarnings("ignore")
def test_a_run_at_toy_size(tiny_llama, tmp_path, capsys):
    records = [{"prompt": f"Say {letter} a:", "completion": f" {letter} AH"} for letter in "bcdfghjklm" * 8]
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    words = ["--model_name_or_path", tiny_llama[0], "--gguf_file", "", "--data", str(data), "--words", "2"]
    words += ["--warmup_steps", "1", "--steps", "2", "--prompts", "2", "--generations", "2", "--rank", "2"]
    words += ["--output_dir", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    grpo_example.main(words)
    stored = json.loads((tmp_path / "results" / "grpo.json").read_text())
    assert [(run["method"], run["seed"], len(run["rewards"])) for run in stored["runs"]] == [
        ("lora", 0, 2),
        ("dora", 0, 2),
    ]
    # the same start
    assert stored["runs"][0]["before"] == stored["runs"][1]["before"]
    assert (tmp_path / "results" / "grpo.png").stat().st_size > 1000
    assert "dora_peft  seed 0   reward " in capsys.readouterr().out
    # what is measured is kept
    grpo_example.main([*words, "--seeds", "0"])
    assert json.loads((tmp_path / "results" / "grpo.json").read_text()) == stored


@pytest.mark.parametrize("change", ["data", "model_name_or_path", "gguf_file", "warmup_steps", "rank", "learning_rate"])
def test_what_decides_a_run_is_in_its_settings(change, tmp_path, monkeypatch):
    """And what decides the start, in what is stored beside it: else a run of something else would be taken for it."""
    one, other = grpo_example.read_options(["--output_dir", str(tmp_path)]), grpo_example.read_options([])
    setattr(other, change, {"data": tmp_path, "rank": 3, "warmup_steps": 3, "learning_rate": 0.5}.get(change, "other"))
    assert grpo_example.settings(one) != grpo_example.settings(other)
    if change == "learning_rate":
        return
    other.output_dir = tmp_path
    folder = tmp_path / "start_0"
    grpo_example.write_json(folder / "made_of.json", {**grpo_example.source(one), "rank": one.rank, "seed": 0})
    monkeypatch.setattr(grpo_example, "load", lambda *_: pytest.fail("made again"))
    assert grpo_example.warm_up(one, 0) == folder
    with pytest.raises(pytest.fail.Exception, match="made again"):
        grpo_example.warm_up(other, 0)


def test_the_words_of_the_warm_up_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 64, encoding="utf-8")
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    options = grpo_example.read_options(["--data", str(tmp_path), "--warmup_steps", "2"])
    monkeypatch.setattr(grpo_example, "load", lambda *_: (None, None))
    monkeypatch.setattr(grpo_example, "accuracy", lambda *_: {})
    with pytest.raises(SystemExit, match="64 records are for the warm-up, and none is left"):
        grpo_example.train(options, "lora", 0, tmp_path)
