"""What the README says is run: its Python, the files it names, and its tables against the stored results."""

import re
from pathlib import Path

import pytest
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

import update_readme

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_python_blocks_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 4
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    create, load, optimize, accelerate = (
        block.replace("meta-llama/Llama-3.2-1B", str(tmp_path / "base")).replace(
            "my-adapter", str(tmp_path / "adapter")
        )
        for block in blocks
    )
    names: dict = {}
    exec(create, names)
    trained = names["model"]
    assert trained.peft_type == "DORA"
    trained.save_pretrained(tmp_path / "adapter")
    exec(load, names)
    assert isinstance(names["model"], PeftModel)
    names["model"] = trained
    exec(optimize, names)
    assert isinstance(names["optimizer"], AdamW)
    before = LoraLinear.forward
    exec(accelerate.replace("dora_peft.acc", "switch = dora_peft.acc"), names)
    assert LoraLinear.forward is not before
    names["switch"].undo()
    assert LoraLinear.forward is before


def test_named_files_exist():
    named = set(re.findall(r"\b(?:scripts|configs|dora_peft)/[\w./-]+\.(?:py|sh|yaml|txt)", README))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_tables_are_those_of_the_stored_results(monkeypatch):
    """The GPU's page too, which README gives one line."""
    assert "| ours / LoRA |" in README
    assert len([line for line in README.splitlines() if f"]({update_readme.GPU_PAGE})" in line]) == 1
    assert (ROOT / update_readme.GPU_PAGE).read_text(encoding="utf-8").count(" | ") > len(update_readme.GPU_LINES)
    monkeypatch.setattr("sys.argv", ["update_readme.py", "--check"])
    assert update_readme.main() == 0
