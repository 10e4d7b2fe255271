"""Libraries that dequantise a whole weight at once, and what happens if they cannot."""

import pytest
import torch
from base_fixtures import MapsOnly, close

from dora_peft.bases import base_weight


def test_a_library_that_cannot_dequantise_is_read_by_its_forward():
    class Broken(MapsOnly):
        W_q = None

        def dequantize(self):
            raise TypeError("missing 1 required positional argument")

    layer = Broken(11, 7)
    matrix = layer.qweight.double() * layer.scales[:, None].double()
    weight = base_weight(layer, "layer")
    assert not weight.has_rows
    close(weight.row_norms_squared(), matrix.square().sum(1))


def test_running_out_of_memory_is_no_reason_to_read_it_otherwise():
    class Large(MapsOnly):
        W_q = None

        def dequantize(self):
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        base_weight(Large(11, 7), "layer")
