"""Zero rows of W0 reach plain PEFT without NaN and are tied again after loading."""

import pytest
from checkpoint_fixtures import IDS, load_ours, load_plain, output, same, save, train, zero_net
from peft import get_peft_model

from dora_peft import DoraConfig

# PEFT says both, in its own tuner and where it creates the factors of ours
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    # PEFT 0.20 only: it looks for the config of a base model without a name
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume"),
]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", ["linear", "transposed", "conv2d", "embed"])
def test_zero_rows_reach_plain_peft_without_nan(kind, trained, tmp_path):
    ours = get_peft_model(zero_net(kind), DoraConfig(r=4, target_modules=[kind]))
    if trained:
        train(ours)
    expected = output(ours.eval())
    assert expected.isfinite().all()
    save(ours, tmp_path)
    plain = output(load_plain(zero_net(kind), tmp_path))
    assert plain.isfinite().all()
    same(plain, expected)
    same(output(load_ours(zero_net(kind), tmp_path)), expected)


def test_zero_rows_are_tied_again_after_loading(tmp_path):
    """They go on training as plain LoRA: their magnitude follows the norm and gets no gradient."""
    save(train(get_peft_model(zero_net("linear"), DoraConfig(r=4, target_modules=["linear"]))), tmp_path)
    loaded = load_ours(zero_net("linear"), tmp_path, is_trainable=True)
    layer = loaded.base_model.model.linear
    loaded(IDS).sum().backward()
    magnitude = layer.lora_magnitude_vector["default"].weight
    zero = (layer.get_base_layer().weight == 0).all(1)
    assert zero.any()
    assert (magnitude.grad[zero] == 0).all()
    assert (magnitude.grad[~zero] != 0).all()
    train(loaded, seed=2)
    output(loaded)
    weight = layer.get_base_layer().weight + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    same(magnitude[zero], weight.norm(dim=1)[zero])
