"""What is special in embeddings and convolutions; what all kinds of layers share is in test_layer.py."""

import pytest
import torch
from layer_fixtures import Truth, adapted, base_of, example


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("kind", ["embedding", "embedding-scaled", "conv1d", "conv2d", "conv2d-grouped", "conv3d"])
def test_small_batches(kind, batch):
    model = adapted(kind)
    x = example(model, batch=batch)
    y = model(x)
    assert y.shape == base_of(model)(x).shape
    y.sum().backward()
    if batch:
        torch.testing.assert_close(y.double(), Truth(model, x).y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "loftq"])
@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_initialisations_of_linear_layers_are_refused_by_name_elsewhere(kind, init):
    options = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    with pytest.raises(ValueError, match=rf"init_lora_weights='{init}'.*'layer'"):
        adapted(kind, init_lora_weights=init, **options)
