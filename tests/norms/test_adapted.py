"""What norms need of a layer is what layers of every kind have."""

import pytest
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig
from dora_peft.norms.adapted import AdaptedLayer

BASES = {
    "linear": lambda: nn.Linear(5, 4),
    "Conv1D": lambda: Conv1D(4, 5),
    "embedding": lambda: nn.Embedding(5, 4),
    "convolution": lambda: nn.Conv2d(3, 4, 3),
}


@pytest.mark.parametrize("base", BASES)
def test_layers_have_all_that_norms_ask_for(base):
    model = get_peft_model(nn.Sequential(BASES[base]()), DoraConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    asked = {name for name in vars(AdaptedLayer) if not name.startswith("_")} | set(AdaptedLayer.__annotations__)
    assert {"factor_parameters", "magnitude", "_norms", "number"} <= asked
    assert [name for name in sorted(asked) if not hasattr(layer, name)] == []
