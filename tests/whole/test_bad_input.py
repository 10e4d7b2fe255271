"""Wrong configurations and folders: each error names what was found and how to mend it, and nothing is half-done."""

import warnings

import pytest
import torch
from bad_input_fixtures import adapted, check_untouched, config, files, llama, output
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from dora_peft import DoraConfig, DoraLayer

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


@pytest.mark.parametrize("targets", [["q_prj"], r".*\.q_prj"])
def test_unknown_target_module(targets):
    base = llama()
    with pytest.raises(ValueError, match=r"q_prj.*not found in the base model.*q_proj.*all-linear"):
        get_peft_model(base, config(target_modules=targets))
    check_untouched(base)


@pytest.mark.parametrize("r", [0, -3, 1.5, True, "8"])
def test_a_rank_that_is_not_a_positive_integer(r):
    with pytest.raises(ValueError, match=rf"`r` should be a positive integer.*{r}"):
        config(r=r)
    with pytest.raises(ValueError, match=rf"positive integer.*{r}.*rank_pattern\['q_proj'\]"):
        config(rank_pattern={"q_proj": r})


def test_a_rank_larger_than_the_layer():
    """Up to the longer side, or 16, which a usual rank on a narrow layer may be, it only wastes parameters."""
    base = llama()
    with pytest.raises(ValueError, match=r"r=17 .*layers\.0\.self_attn\.q_proj.*16 x 16.*r <= 16.*rank_pattern"):
        get_peft_model(base, config(r=17))
    check_untouched(base)
    for width, allowed in ((2, 16), (20, 20)):
        get_peft_model(nn.Sequential(nn.Linear(width, 2)), DoraConfig(r=allowed, target_modules=["0"]))
        narrow = nn.Sequential(nn.Linear(width, 2))
        with pytest.raises(ValueError, match=rf"r={allowed + 1} .*module '0'.*2 x {width}.*r <= 2"):
            get_peft_model(narrow, DoraConfig(r=allowed + 1, target_modules=["0"]))


def test_a_base_weight_of_integers():
    base = llama()
    layer = base.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj.*Linear.*float32.*torch\.int8.*exclude_modules"
    ):
        get_peft_model(base, config())
    assert not any(isinstance(m, DoraLayer) for m in base.modules())


@pytest.mark.parametrize("module", [nn.LSTM(4, 4), nn.LayerNorm(4), nn.MultiheadAttention(4, 2)])
def test_a_module_that_cannot_be_adapted(module):
    base = nn.ModuleDict({"odd": module, "even": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"odd.*exclude_modules"):
        get_peft_model(base, DoraConfig(r=2, target_modules=r"even|odd(\.out_proj)?"))
    assert type(base["even"]) is nn.Linear
    assert base["odd"] is module


def test_after_a_refusal_the_same_model_can_be_adapted():
    base = llama()
    with pytest.raises(ValueError, match="r=17"):
        get_peft_model(base, config(r=17))
    with warnings.catch_warnings():
        # PEFT warns about adapters that are there already
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base, config())
    assert list(model.peft_config) == ["default"]
    assert model.base_model.model is base


def test_a_refused_second_adapter_leaves_the_first():
    model = adapted()
    before = output(model)
    keys = model.state_dict().keys()
    for wrong in (config(r=17), config(target_modules=["q_prj"])):
        with pytest.raises(ValueError, match=r"r=17|q_prj"):
            model.add_adapter("second", wrong)
        assert list(model.peft_config) == ["default"]
        assert model.state_dict().keys() == keys
        assert torch.equal(output(model), before)
    model.add_adapter("second", config())


def test_adapters_of_different_kinds():
    message = r"different peft types.*{}.*{}.*'second'.*merge_and_unload"
    model = adapted()
    with pytest.raises(ValueError, match=message.format("DORA", "LORA")):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=message.format("DORA", "IA3")):
        model.add_adapter("second", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    plain = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=message.format("LORA", "DORA")):
        plain.add_adapter("second", config())
    assert list(plain.peft_config) == ["default"]


def test_a_plain_lora_folder_given_as_dora(tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Expected a DoRA adapter, found plain LoRA.*peft\.LoraConfig") as caught:
        DoraConfig.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    base = llama()
    with pytest.raises(ValueError, match=r"no magnitude \(a plain LoRA adapter\?\).*peft\.LoraConfig"):
        PeftModel.from_pretrained(base, tmp_path, config=DoraConfig(target_modules=["q_proj"]))
    check_untouched(base)
    model = adapted()
    with pytest.raises(ValueError, match=r"different peft types.*'second'.*merge_and_unload"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]


def test_an_adapter_of_another_base_model(saved):
    base = llama(hidden_size=24)
    with pytest.raises(ValueError, match=r"(?s)q_proj.*another base model.*own base model") as caught:
        PeftModel.from_pretrained(base, saved)
    assert str(saved) in str(caught.value)
    assert not any(isinstance(m, DoraLayer) for m in base.modules())


def test_a_folder_without_config(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    message = r"adapter_config\.json.*notes\.txt.*save_pretrained"
    base, model = llama(), adapted()
    for load in (
        lambda: PeftModel.from_pretrained(base, tmp_path),
        lambda: model.load_adapter(tmp_path, "second"),
        lambda: PeftConfig.from_pretrained(str(tmp_path)),
        lambda: DoraConfig.from_pretrained(str(tmp_path)),
        lambda: model.hotswap_adapter(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load()
        assert str(tmp_path) in str(caught.value)
    check_untouched(base)
    assert list(model.peft_config) == ["default"]


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    for save in (adapted().save_pretrained, config().save_pretrained):
        with pytest.raises(ValueError, match=r"file") as caught:
            save(str(tmp_path / "adapter"))
        assert str(tmp_path / "adapter") in str(caught.value)
    assert files(tmp_path) == {"adapter": b"mine"}


def test_a_folder_that_may_not_be_created(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"Could not save the adapter in.*another directory") as caught:
        adapted().save_pretrained(tmp_path / "file" / "adapter")
    assert str(tmp_path / "file" / "adapter") in str(caught.value)
    assert files(tmp_path) == {"file": b"mine"}
