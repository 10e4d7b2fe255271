"""Weighted sums of adapters."""

import pytest
from model_fixtures import (
    adapter_parameters,
    config,
    dense,
    dense_output,
    dora_layers,
    mlp,
    output,
    same,
    train,
    two_adapters,
)
from peft import PeftModel, get_peft_model

from dora_peft import reference

OTHER_TYPES = ["linear", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "magnitude_prune"]


def combined(model, weights):
    """W0 + sum_i w_i (W'_i - W0) per adapted module, by the reference."""
    out = {}
    for name, layer in dora_layers(model).items():
        parts = [
            (
                *(t.detach() for t in layer.factors(adapter)),
                layer.lora_magnitude_vector[adapter].weight.detach(),
                layer.scaling[adapter],
            )
            for adapter in weights
        ]
        out[name] = reference.weighted_sum(layer.original_weight().detach(), parts, list(weights.values()))
    return out


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.5, -0.5), (-1.0, 0.25), (1.0, 0.0)])
def test_a_weighted_sum_is_the_references(weights, kind, rslora):
    model = two_adapters(use_rslora=rslora)
    weights = dict(zip(("default", "second"), weights, strict=True))
    expected = combined(model, weights)
    # r = 2 and 3: nothing is cut off
    full_rank = 5 if kind == "svd" else None
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type=kind, svd_rank=full_rank)
    for name, layer in dora_layers(model).items():
        same(dense(layer, ["sum"]), expected[name])
    model.set_adapter("sum")
    same(output(model), dense_output(model, ["sum"]))
    model.merge_adapter()
    for name, layer in dora_layers(model).items():
        same(layer.get_base_layer().weight, expected[name])


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_one_adapter_of_weight_one_is_itself(kind):
    model = two_adapters()
    expected = output(model)
    model.add_weighted_adapter(["default"], [1.0], "copy", combination_type=kind)
    model.set_adapter("copy")
    same(output(model), expected)


def test_a_weighted_sum_is_saved_and_loaded(tmp_path):
    model = two_adapters()
    model.add_weighted_adapter(["default", "second"], [0.7, -0.3], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(mlp(), tmp_path / "sum")
    same(output(loaded.eval()), output(model))


def test_a_weighted_sum_of_adapters_with_different_modules():
    model = train(get_peft_model(mlp(), config(target_modules=["up"])))
    model.add_adapter("second", config(r=3, target_modules=["down"]))
    train(model, "second", seed=2)
    weights = {"default": 0.5, "second": 2.0}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    for name, adapter in (("up", "default"), ("down", "second")):
        layer = dora_layers(model)[name]
        weight = layer.original_weight().detach()
        same(dense(layer, ["sum"]), weight + weights[adapter] * (dense(layer, [adapter]) - weight))


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_combinations_of_the_factors_alone_are_refused_with_the_reason(kind):
    model = two_adapters()
    with pytest.raises(ValueError, match=rf"'cat' and 'svd' for DoRA, found '{kind}'.*not linear in A and B"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type=kind, density=0.5)
    assert "sum" not in model.peft_config
    assert not adapter_parameters(model, "sum")


@pytest.mark.parametrize(
    ("names", "weights"), [(["default", "third"], [1.0, 1.0]), (["default"], [1.0, 2.0]), ([], [])]
)
def test_a_weighted_sum_needs_existing_adapters_and_as_many_weights(names, weights):
    model = two_adapters()
    with pytest.raises(ValueError, match="Expected existing adapters"):
        model.add_weighted_adapter(names, weights, "sum")
    assert "sum" not in model.peft_config
