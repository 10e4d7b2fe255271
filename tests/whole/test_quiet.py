"""What a newcomer sees of an import and of README's first lines: nothing that other libraries say about themselves."""

import os
import re
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
# As after `pip install .`: what only the extras install is hidden, as what it prints is for those who installed it.
PLAIN = """
import importlib.util, sys
find = importlib.util.find_spec
hidden = ("bitsandbytes", "torchao", "liger_kernel", "kernels", "trl")
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in hidden else find(name, *rest)
sys.modules.update(dict.fromkeys(hidden))
"""


def printed(code: str) -> tuple[list[str], list[str]]:
    """What a fresh interpreter writes to stdout and to stderr, without bars of progress."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", PLAIN + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    messages = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and not re.search(r"\d+%\|", line)]
    return done.stdout.splitlines(), messages


def test_an_import_prints_nothing():
    assert printed("import dora_peft") == ([], [])


def test_the_first_lines_of_readme_print_what_is_trained_and_nothing_else(tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)[0]
    out, messages = printed(first.replace("meta-llama/Llama-3.2-1B", str(tmp_path)))
    assert [line.partition(":")[0] for line in out] == ["trainable params"]
    assert messages == []


def test_a_user_who_asks_for_all_warnings_gets_them():
    code = (
        "import warnings, dora_peft\nwarnings.simplefilter('always')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, "
        "num_attention_heads=1))\n"
        "warnings.warn('`is_gradient_checkpointing` is deprecated', FutureWarning)"
    )
    assert any("is_gradient_checkpointing" in line for line in printed(code)[1])
