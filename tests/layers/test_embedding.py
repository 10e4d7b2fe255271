"""What is special in embeddings; what all kinds of layers share is in test_layer.py."""

import pytest
import torch
from layer_fixtures import adapted, check, example


@pytest.mark.parametrize("mode", ["branch", "paper"])
def test_an_embedding_has_no_dropout(mode):
    model = adapted("embedding", torch.float64, lora_dropout=0.5, dropout_mode=mode)
    check(model, example(model))
