"""What the demo's commands print: what they say themselves, and nothing of other libraries."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_fixtures import make_config, write_jsonl
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from dora_peft import DoraConfig

ROOT = Path(__file__).parents[2]
# A bar of progress, or one of datasets that does not know its end.
BAR = re.compile(r"\d+%\||\d+ examples \[")


def messages(folder: Path, *command: str) -> list[str]:
    """What a command writes to stderr in the demo's environment, without bars of progress."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "TRITON_INTERPRET")
    }
    path = [ROOT / "scripts" / "quiet", ROOT]
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(folder)}
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    # bars below each other move the cursor
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[\d*[A-Z]", "", done.stderr))
    return [line for line in lines if line.strip() and not BAR.search(line)]


def script(name: str) -> str:
    return str(ROOT / "scripts" / f"{name}.py")


def test_the_demo_puts_the_folder_before_its_commands_and_hides_no_category() -> None:
    demo = (ROOT / "scripts" / "demo.sh").read_text(encoding="utf-8")
    assert "export PYTHONPATH=$PWD/scripts/quiet" in demo.partition('"$VENV_PYTHON" scripts/finetune_llama.py')[0]
    assert "PYTHONWARNINGS" not in demo


def test_training_prints_nothing_of_other_libraries(tmp_path: Path) -> None:
    assert messages(tmp_path, script("finetune_llama"), str(make_config(tmp_path))) == []


def test_evaluation_and_conversation_print_nothing_of_other_libraries(tmp_path: Path) -> None:
    make_config(tmp_path)
    base, adapter = str(tmp_path / "model"), str(tmp_path / "adapter")
    config = DoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    words = write_jsonl(tmp_path / "words.jsonl", [{"prompt": "Say b a l l:", "completion": " B AO L"}])
    where = ["--model_name_or_path", base, "--adapter", adapter]
    assert messages(tmp_path, script("evaluate_spelling"), *where, "--dataset", str(words)) == []
    talk = ["--task", "spelling", "--compare", "--max_new_tokens", "2", "--say", "ball"]
    assert messages(tmp_path, script("chat"), *where, *talk) == []


@pytest.mark.slow
def test_the_memory_benchmark_prints_nothing_of_other_libraries(tmp_path: Path) -> None:
    plot = ["--steps", "1", "--json", str(tmp_path / "memory.json"), "--plot", str(tmp_path / "memory.png")]
    assert messages(tmp_path, script("benchmark_memory"), str(make_config(tmp_path)), *plot) == []


def test_only_the_named_messages_are_kept_out(tmp_path: Path) -> None:
    said = [
        ("torchao", "Failed to load a.so: no such library", True),
        ("torchao", "another message", False),
        ("torchao.quantization", "Failed to load a.so", False),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community", True),
        ("bitsandbytes.backends.cpu.ops", "Failed to load the library", False),
        ("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass", True),
        ("torch.utils._pytree", "<enum 'Other'> is an Enum subclass", False),
        ("dora_peft", "Failed to load the adapter", False),
    ]
    code = "import logging\n" + "\n".join(
        f"logging.getLogger({logger!r}).warning({text!r})" for logger, text, _ in said
    )
    assert messages(tmp_path, "-c", code) == [text for _, text, kept_out in said if not kept_out]
    code = (
        "import warnings\nwarnings.warn('`is_gradient_checkpointing` is deprecated, see', FutureWarning)\n"
        "warnings.warn('DoRA: the norm', UserWarning)\nwarnings.warn('another change', FutureWarning)"
    )
    shown = [line for line in messages(tmp_path, "-c", code) if "Warning: " in line]
    assert [line.rpartition(": ")[2] for line in shown] == ["the norm", "another change"]


def test_the_missing_configuration_of_the_demos_model_is_kept_out_and_that_of_others_shown(tmp_path: Path) -> None:
    """PEFT's own message as it saves an adapter to a model without config.json, which it looks for on no Hub here."""
    code = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
base = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))
base.name_or_path = base.config._name_or_path = sys.argv[1]
get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained("adapter")
"""
    for folder in ("data/smollm2", "data/other"):
        (tmp_path / folder).mkdir(parents=True)
    assert messages(tmp_path, "-c", code, "data/smollm2") == []
    assert any(
        "Could not find a config file in data/other" in line for line in messages(tmp_path, "-c", code, "data/other")
    )


def test_a_sitecustomize_that_is_hidden_runs_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; print('mine', file=sys.stderr)", encoding="utf-8")
    path = os.pathsep.join([str(ROOT / "scripts" / "quiet"), str(tmp_path)])
    command = [sys.executable, "-c", "pass"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["mine"]


def test_a_folder_of_that_name_is_no_module_to_run(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize").mkdir()
    path = os.pathsep.join([str(ROOT / "scripts" / "quiet"), str(tmp_path)])
    command = [sys.executable, "-c", "pass"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stderr == ""
