"""The model card that save_pretrained writes."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dora_peft import DoraConfig
from dora_peft.adapters import card as card_module

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


def llama(name=""):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model.config._name_or_path = name
    return model


@pytest.fixture
def base_folder(tmp_path):
    folder = tmp_path / "tiny-base"
    llama().save_pretrained(folder)
    return folder


def section(text):
    start, end = text.index("<!-- dora_peft: start -->"), text.index("<!-- dora_peft: end -->")
    return text[start:end]


def test_the_card_names_base_method_rank_and_both_ways_to_load(tmp_path, base_folder):
    model = LlamaForCausalLM.from_pretrained(base_folder)
    config = DoraConfig(r=3, lora_alpha=7, lora_dropout=0.25, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == str(base_folder)
    assert {"dora", "lora"} <= set(card.data.tags)
    ours = section(card.text)
    for words in (str(base_folder), "DoRA", "2402.09353", "r = 3", "lora_alpha = 7", "dropout 0.25", "detached from"):
        assert words in ours, words
    assert "import dora_peft" in ours
    assert "AutoModelForCausalLM" in ours


def test_the_code_of_the_card_runs(tmp_path, base_folder):
    model = LlamaForCausalLM.from_pretrained(base_folder)
    config = DoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ours = section((tmp_path / "adapter" / "README.md").read_text())
    blocks = re.findall(r"```python\n(.*?)```", ours, flags=re.DOTALL)
    assert len(blocks) == 2
    namespace = {}
    for block in reversed(blocks):
        # "one line comes first"
        exec(block.replace("<this repository or folder>", str(tmp_path / "adapter")), namespace)
    ids = torch.arange(6)[None]
    assert isinstance(namespace["model"], PeftModel)
    torch.testing.assert_close(namespace["model"].eval()(ids).logits, adapted(ids).logits)


def test_not_detached_is_said(tmp_path):
    get_peft_model(llama(), DoraConfig(target_modules=["q_proj"], detach_norm=False)).save_pretrained(tmp_path)
    assert "part of the gradient" in section((tmp_path / "README.md").read_text())


def test_saving_again_replaces_the_section_and_keeps_what_people_wrote(tmp_path):
    model = get_peft_model(llama(), DoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    card = ModelCard.load(readme)
    card.text = f"# A title of ours\n\n{card.text}\n\nWords after it.\n"
    card.data["license"] = "mit"
    card.save(readme)
    get_peft_model(llama(), DoraConfig(r=5, target_modules=["q_proj"])).save_pretrained(tmp_path)
    again = ModelCard.load(readme)
    for words in ("# A title of ours", "Words after it.", "r = 5"):
        assert again.text.count(words) == 1, words
    assert "r = 2" not in again.text
    assert again.data["license"] == "mit"
    assert again.text.count("dora_peft: start") == again.text.count("dora_peft: end") == 1
    third = readme.read_text()
    get_peft_model(llama(), DoraConfig(r=5, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert readme.read_text() == third


def test_the_card_describes_the_adapter_that_is_saved(tmp_path):
    model = get_peft_model(llama(), DoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", DoraConfig(r=6, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    described = section((tmp_path / "README.md").read_text())
    assert "r = 6" in described
    assert "r = 2" not in described


def test_a_model_that_is_not_from_transformers(tmp_path):
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), DoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    assert "DoRA" in section((tmp_path / "README.md").read_text())


def test_a_card_without_readable_header_does_not_prevent_saving(tmp_path):
    (tmp_path / "README.md").write_text("no header, just text\n")
    get_peft_model(llama(), DoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "no header, just text" in text
    assert "dora_peft: start" in text
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("address", ["", "https://example.org/dora_peft"])
def test_the_card_names_the_projects_address_and_no_other(tmp_path, monkeypatch, address):
    monkeypatch.setattr(card_module, "PROJECT_ADDRESS", address)
    get_peft_model(llama(), DoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    ours = section((tmp_path / "README.md").read_text())
    expected = {"https://arxiv.org/abs/2402.09353"} | ({address} if address else set())
    assert set(re.findall(r"https?://[^\s)\"]+", ours)) == expected
    assert not re.search(r"pip install|pypi", ours)


def test_nothing_names_a_package_or_an_address_that_does_not_exist():
    """A name on a package index that nobody owns can be taken by anybody, whose code would then be installed."""
    root, address = Path(__file__).parents[2], card_module.PROJECT_ADDRESS
    pyproject = (root / "pyproject.toml").read_text()
    urls = re.search(r"(?ms)^\[project\.urls\]\n(.*?)(^\[|\Z)", pyproject)
    assert (urls is not None) == bool(address)
    assert urls is None or set(re.findall(r'= "(.*?)"', urls[1])) == {address}
    assert address in (root / "README.md").read_text()
    files = [root / "README.md", *(p for f in ("dora_peft", "scripts") for p in (root / f).rglob("*.py"))]
    assert len(files) > 100
    for file in files:
        text = file.read_text()
        assert not re.search(r"install(\s+-\S+)*\s+['\"]?dora[-_]peft|pypi\.org/project/dora", text), file
