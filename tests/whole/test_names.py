"""Modules whose names end like another module's: what is meant for one must not reach the other."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from dora_peft import DoraConfig
from dora_peft.plugin.configs import plain_peft_configs


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.block = nn.Sequential()
        self.block.add_module("lin", nn.Linear(8, 8))

    def forward(self, x):
        return self.block(self.lin(x))


def trained(config, adapter="default"):
    torch.manual_seed(0)
    base = Nested()
    model = get_peft_model(copy.deepcopy(base), config, adapter_name=adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return base, model.eval(), torch.randn(3, 8)


@pytest.mark.parametrize(
    "options", [{"target_modules": "lin"}, {"target_modules": ["lin"], "rank_pattern": {"block.lin": 3}}]
)
def test_weighted_adapter_keeps_modules_and_ranks(options):
    _, model, x = trained(DoraConfig(r=2, **options), "first")
    expected = model(x)
    model.add_weighted_adapter(["first"], [1.0], "copy")
    model.set_adapter("copy")
    torch.testing.assert_close(model(x), expected)


def test_magnitude_only_module_beside_a_longer_name(tmp_path):
    base, model, x = trained(DoraConfig(r=4, target_modules=["block.lin"], magnitude_only_modules="lin"))
    model.save_pretrained(tmp_path)
    with plain_peft_configs():
        plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(plain(x), model(x))
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


# PEFT 0.20 says so although the adapter is being converted
@pytest.mark.filterwarnings("ignore:PiSSA changes")
def test_conversion_of_pissa_leaves_magnitude_only_modules(tmp_path):
    config = DoraConfig(r=2, target_modules=["block.lin"], magnitude_only_modules="lin", init_lora_weights="pissa")
    torch.manual_seed(0)
    base = Nested()
    model = get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    x = torch.randn(3, 8)
    expected = model.eval()(x)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)


def test_a_magnitude_only_name_that_does_not_exist():
    with pytest.raises(ValueError, match=r"nothere.*named lin"):
        get_peft_model(Nested(), DoraConfig(target_modules=["lin"], magnitude_only_modules=["nothere"]))
