"""What vLLM and SGLang themselves ask of an adapter's folder, if they are installed (scripts/engines.sh runs both)."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dora_peft import DoraConfig
from dora_peft.adapters.export import export

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A DoRA adapter whose rank, alpha and patterns no server could take as they are; and its two LoRA exports."""
    root = tmp_path_factory.mktemp("servers")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    model = LlamaForCausalLM.from_pretrained(root / "base")
    dora = DoraConfig(r=3, lora_alpha=7, target_modules=MODULES, rank_pattern={"q_proj": 5}, use_rslora=True)
    adapted = get_peft_model(model, dora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(root / "dora")
    export(root / "dora", root / "base", root / "exact", "exact")
    export(root / "dora", root / "base", root / "lora", "lora", rank=16)
    return {"dora": root / "dora", "exact": root / "exact" / "adapter", "lora": root / "lora"}


@pytest.mark.parametrize(("form", "rank"), [("exact", 8), ("lora", 16)])
def test_what_servers_read_of_a_configuration(folders, form, rank):
    """Without them: one rank of vLLM's list, no scaling, no patterns, and a list of modules, as SGLang asks."""
    config = json.loads((folders[form] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert not any(config.get(key) for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"))
    assert not any(config.get(key) for key in ("modules_to_save", "layer_replication", "lora_bias"))
    assert config["bias"] == "none"
    assert isinstance(config["target_modules"], list)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == set(MODULES)


@pytest.mark.parametrize("form", ["dora", "exact", "lora"])
def test_vllm_takes_what_is_written(folders, form):
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper.from_local_dir(str(folders[form]), None)
    limits = pytest.importorskip("vllm.config.lora").LoRAConfig(max_lora_rank=16)
    if form == "dora":
        with pytest.raises(ValueError, match="DoRA"):
            helper.validate_legal(limits)
    else:
        helper.validate_legal(limits)
        assert helper.vllm_lora_scaling_factor == 1


@pytest.mark.parametrize("form", ["dora", "exact", "lora"])
def test_sglang_takes_what_is_written(folders, form, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts"))
    from engines.sglang_checks import check

    try:
        if form == "dora":
            with pytest.raises(ValueError, match="DoRA"):
                check(folders[form], set(MODULES))
        else:
            assert check(folders[form], set(MODULES)) == {"scaling": 1.0}
    except PackageNotFoundError:
        pytest.skip("sglang is not installed")
    finally:
        sys.modules.pop("sglang_lora_config", None)
