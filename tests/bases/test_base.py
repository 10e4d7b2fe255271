"""Every kind of base layer behaves as its dense [out, in] matrix; a layer of no kind is refused by name."""

import pytest
import torch
from base_fixtures import ALL, DENSE, QUANTISED, WITH_ROWS, build, close
from torch import nn

from dora_peft.bases import base_weight
from dora_peft.ops import norm


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("kind", ALL)
def test_methods_equal_those_of_the_matrix(kind):
    layer, matrix = build(kind)
    weight = base_weight(layer, "layer")
    out, width = matrix.shape
    assert (weight.out_features, weight.in_features) == (out, width)
    assert weight.dtype == (torch.float64 if kind == "linear-fp64" else torch.float32)
    close(weight.row_norms_squared(), matrix.square().sum(1))
    A = torch.randn(3, width, dtype=weight.dtype)
    close(weight.times(A), matrix @ A.double().T)
    g = torch.randn(out, 3, dtype=weight.dtype)
    close(weight.vjp(g), g.double().T @ matrix)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("kind", WITH_ROWS)
def test_rows_equal_those_of_the_matrix(kind):
    layer, matrix = build(kind)
    weight = base_weight(layer, "layer")
    assert weight.has_rows
    index = torch.tensor([len(matrix) - 1, 0, len(matrix) // 2])
    close(weight.rows(index), matrix[index])
    for j in range(len(matrix)):
        close(weight.rows(torch.tensor([j])), matrix[j : j + 1])


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("kind", {**DENSE, **QUANTISED})
def test_blocks_cover_the_matrix_once(kind):
    layer, matrix = build(kind)
    weight = base_weight(layer, "layer")
    blocks = [(start, stop, rows.clone()) for start, stop, rows in weight.blocks()]
    assert [start for start, _, _ in blocks] == [0, *(stop for _, stop, _ in blocks[:-1])]
    assert blocks[-1][1] == len(matrix)
    assert [len(block) for _, _, block in blocks] == [stop - start for start, stop, _ in blocks]
    close(torch.cat([block for _, _, block in blocks]), matrix)


@pytest.mark.parametrize("kind", {**DENSE, **QUANTISED})
def test_blocks_may_start_anywhere(kind):
    layer, matrix = build(kind)
    weight = base_weight(layer, "layer")
    out = len(matrix)
    for start, stop in ((0, 1), (out // 3, out // 3 + 1), (out // 2, out), (out - 1, out)):
        close(weight.block(start, stop), matrix[start:stop])


@pytest.mark.parametrize("kind", ALL)
def test_reading_leaves_the_weight_alone(kind):
    layer, _ = build(kind)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight = base_weight(layer, "layer")
    A = torch.randn(2, weight.in_features, dtype=weight.dtype)
    norm.factored_norm_squared(weight, weight.row_norms_squared(), A, torch.randn(weight.out_features, 2).to(A), 1.0)
    weight.vjp(torch.randn(weight.out_features, 2, dtype=weight.dtype))
    after = layer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_given_weight_stands_in_for_the_layers_own():
    layer, _ = build("conv1D")
    other = nn.Parameter(torch.randn_like(layer.weight))
    close(base_weight(layer, "layer", other).rows(torch.arange(7)), other.detach().double().T)


def test_integer_weights_are_refused_by_name():
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int32), requires_grad=False)
    with pytest.raises(ValueError, match=r"'block\.proj'.*Linear.*found torch\.int32.*exclude_modules=\['proj'\]"):
        base_weight(layer, "block.proj")


def test_modules_without_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'block\.norm'.*in_features"):
        base_weight(nn.Identity(), "block.norm")
