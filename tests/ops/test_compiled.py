"""v and the output in the graph of torch.compile: the reference's values and gradients, without a graph as well."""

import pytest
import torch
from covering import pairs

from dora_peft import reference
from dora_peft.ops import compiled
from dora_peft.ops.norm import floor


def drawn(dtype, out_features=7, in_features=5, rank=3, lead=(2, 4)):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*lead, in_features), (rank, in_features), (out_features, rank), (out_features, in_features)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def product(x, lora_A, lora_B, weight, scaling):
    composed, _ = compiled.composed_norm(weight, lora_A, lora_B, scaling)
    return compiled.composed_product(x, lora_A, lora_B, weight, composed, scaling)


@pytest.mark.parametrize(
    ("dtype", "lead", "needed"),
    pairs([torch.float32, torch.float64], [(), (6,), (2, 0), (2, 3, 4)], ["all", "x", "A", "B"]),
)
def test_the_product_and_its_gradients(dtype, lead, needed):
    x, lora_A, lora_B, weight = drawn(dtype, lead=lead)
    if not lead:
        x = x[None]
    inputs = {"x": x, "A": lora_A, "B": lora_B}
    leaves = [t.clone().requires_grad_(needed in ("all", name)) for name, t in inputs.items()]
    others = [t.clone().requires_grad_(needed in ("all", name)) for name, t in inputs.items()]
    found = product(*leaves, weight, 0.7)
    expected = others[0] @ (weight + 0.7 * others[2] @ others[1]).T
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    found.backward(grad)
    expected.backward(grad)
    for leaf, other in zip(leaves, others, strict=True):
        assert (leaf.grad is None) == (other.grad is None)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, other.grad)


def test_gradients_by_differences():
    x, lora_A, lora_B, weight = drawn(torch.float64)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    assert torch.autograd.gradcheck(lambda *t: product(*t, weight, -1.5), leaves)


def test_the_norm_is_the_references_and_has_no_gradient():
    _, lora_A, lora_B, weight = drawn(torch.float32)
    lora_A.requires_grad_()
    composed, norm = compiled.composed_norm(weight, lora_A, lora_B, 2.0)
    torch.testing.assert_close(norm, reference.weight_norm(weight, lora_A, lora_B, 2.0).detach())
    torch.testing.assert_close(composed, (weight + 2.0 * lora_B @ lora_A).detach())
    assert not norm.requires_grad
    assert not composed.requires_grad


def test_a_row_that_vanishes_is_floored():
    _, lora_A, lora_B, weight = drawn(torch.float64)
    lora_B[2] = -lora_B[1]
    weight[1:3] = lora_B[1:3].neg() @ lora_A
    _, norm = compiled.composed_norm(weight, lora_A, lora_B, 1.0)
    assert torch.equal(norm[1:3], floor(weight.square().sum(1))[1:3])
    assert (norm[[0, 3, 4, 5, 6]] > 1e-3).all()


def test_what_is_not_composed(monkeypatch):
    _, lora_A, lora_B, weight = drawn(torch.float32)
    assert compiled.can_compose(weight, lora_A, lora_B)
    assert not compiled.can_compose(weight.bfloat16(), lora_A.bfloat16())
    assert not compiled.can_compose(weight, lora_A.double())
    assert not compiled.can_compose(weight, lora_A.to("meta"))
    monkeypatch.setattr(compiled, "MOST_BYTES", weight.nbytes - 1)
    assert not compiled.can_compose(weight, lora_A, lora_B)
