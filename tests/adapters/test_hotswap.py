"""An adapter takes the place of another one, and a change that fails or is interrupted leaves the model as it was."""

import pytest
import torch
from model_fixtures import config, differs, mlp, output, same, saved_second, train, unchanged
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from dora_peft import DoraLayer


def test_hotswap_replaces_tensors_scaling_and_outputs(tmp_path):
    expected = saved_second(tmp_path, lora_alpha=9)
    model = train(get_peft_model(mlp(), config()))
    differs(output(model), expected)
    parameters = {n: id(p) for n, p in model.named_parameters()}
    model.hotswap_adapter(str(tmp_path))
    same(output(model), expected)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert model.peft_config["default"].lora_alpha == 9
    model.save_pretrained(tmp_path / "again")
    same(output(PeftModel.from_pretrained(mlp(), tmp_path / "again").eval()), expected)


@pytest.mark.parametrize(
    ("within", "change"),
    [
        (
            "dora_peft.adapters.combine._fill_layer",
            lambda model, _: model.add_weighted_adapter(["default"], [2.0], "sum"),
        ),
        ("dora_peft.adapters.hotswap.from_checkpoint", lambda model, folder: model.hotswap_adapter(str(folder))),
        ("peft.peft_model.load_peft_weights", PeftModel.from_pretrained),
    ],
    ids=["weighted sum", "hotswap", "load"],
)
def test_an_interrupted_change_leaves_the_model_as_it_was(within, change, tmp_path, monkeypatch):
    """Ctrl-C in the middle, which is no Exception."""
    saved_second(tmp_path, lora_alpha=9)
    # By name, because registering again patches the method again.
    model = mlp() if change.__name__ == "from_pretrained" else train(get_peft_model(mlp(), config()))
    before, modules, adapters = (
        output(model),
        [type(m) for m in model.modules()],
        list(getattr(model, "peft_config", ())),
    )

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(within, interrupt)
    with pytest.raises(KeyboardInterrupt):
        change(model, tmp_path)
    same(output(model), before)
    assert [type(m) for m in model.modules()] == modules
    assert list(getattr(model, "peft_config", ())) == adapters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4}, "same tensors of the same shapes"),
        ({"target_modules": ["up"]}, "same tensors of the same shapes"),
        ({"target_modules": ["up", "down", "head"]}, "same tensors of the same shapes"),
        ({"use_rslora": True}, "use_rslora is False and True"),
        ({"lora_dropout": 0.5}, "lora_dropout is 0.0 and 0.5"),
        ({"dropout_mode": "paper"}, "dropout_mode is 'branch' and 'paper'"),
    ],
)
def test_a_hotswap_that_does_not_fit_leaves_the_old_adapter(options, message, tmp_path):
    saved_second(tmp_path, **options)
    model = train(get_peft_model(mlp(), config()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = output(model)
    with pytest.raises(ValueError, match=message):
        model.hotswap_adapter(str(tmp_path))
    assert unchanged(model, before)
    assert torch.equal(output(model), expected)


def test_a_merged_adapter_is_not_swapped(tmp_path):
    saved_second(tmp_path)
    model = train(get_peft_model(mlp(), config()))
    model.merge_adapter()
    before = output(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.hotswap_adapter(str(tmp_path))
    assert torch.equal(output(model), before)


def test_an_interruption_of_the_scalings_leaves_them(tmp_path, monkeypatch):
    """Of a prepared model these are tensors, and written in place."""
    saved_second(tmp_path, lora_alpha=9)
    model = train(get_peft_model(mlp(), config()))
    prepare_model_for_compiled_hotswap(model)
    before, calls, set_scale = output(model), [], DoraLayer.set_scale

    def interrupted(self, *args):
        calls.append(set_scale(self, *args))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(DoraLayer, "set_scale", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(output(model), before)
    assert model.peft_config["default"].lora_alpha == 3
