"""PeftMixedModel refuses DoRA with the reason, and takes what it took."""

import pytest
from model_fixtures import config, mlp
from peft import LoHaConfig, LoraConfig, PeftMixedModel, get_peft_model


def test_mixed_models_refuse_dora_with_the_reason():
    with pytest.raises(ValueError, match=r"scales W0 and the change alike.*without mixed=True.*merge_and_unload"):
        get_peft_model(mlp(), config(), mixed=True)
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["up"]), mixed=True)
    with pytest.raises(ValueError, match="scales W0 and the change alike"):
        model.add_adapter("second", config())
    assert list(model.peft_config) == ["default"]


def test_other_kinds_mix_as_before():
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["up"]), mixed=True)
    model.add_adapter("second", LoHaConfig(r=2, target_modules=["down"]))
    assert isinstance(model, PeftMixedModel)
    assert list(model.peft_config) == ["default", "second"]
