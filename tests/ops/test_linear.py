"""DoRA's linear layer as one autograd function against the float64 reference: values and gradients."""

import gc
import platform
import threading
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from covering import pairs
from linear_fixtures import (
    BF16,
    FLOOR,
    FORMS,
    FP16,
    FP32,
    FP64,
    LENGTHS,
    ROUNDING,
    Made,
    Problem,
    Products,
    S,
    by_kernels,
    check,
    distance,
    gradients,
    randn,
)
from torch import nn

from dora_peft.ops import linear as subject
from dora_peft.ops.chunks import CHUNK
from dora_peft.ops.scaled_sum import fold

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# of the base, of A and B
DTYPES = [(FP64, FP64), (FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]


def test_fresh_buffers_are_poisoned():
    """Without it the tests below would not notice that uninitialised memory is read."""
    x = torch.ones(3, 5)
    for fresh in (torch.empty(7), torch.empty_like(x), x.new_empty(4, dtype=FP64), torch.empty_like(x, dtype=BF16)):
        assert fresh.isnan().all()


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")
@pytest.mark.implementation("triton")
@pytest.mark.parametrize("alpha", [1.0, S])
def test_evaluation_takes_what_was_folded_for_another_road(alpha):
    """B folded before it was known that kernels run holds no s."""
    problem = Problem(5, dtype=FP32)
    with torch.no_grad():
        x, A, B, c, b = problem.parts()
        folded = fold(B, c, S / alpha)
        y = subject.linear_eval(x, A, folded, c, weight=problem.weight, bias=b, alpha=alpha)
    assert distance(y, problem.y("weight")) <= FLOOR[FP32]


@pytest.mark.parametrize(("dtypes", "form", "bias", "n"), pairs(DTYPES, FORMS, [False, True], LENGTHS))
def test_forward_and_gradients(dtypes, form, bias, n):
    dtype, factors = dtypes
    check(Problem(n, dtype=dtype, factors=factors, bias=bias), form)


@pytest.mark.parametrize("r", [1, 3, 17])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (9, 33), (33, 9)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
def test_sizes(dtype, form, width, out, r):
    check(Problem(5, width=width, out=out, r=r, dtype=dtype), form)


LAYOUTS = {
    "1 dimension": ((), None),
    "3 dimensions": ((2, 3), None),
    "4 dimensions": ((2, 1, 3), None),
    "no tokens in 3 dimensions": ((2, 0), None),
    "transposed tokens": ((2, 3), lambda x: x.transpose(0, 1)),
    "transposed features": ((9,), lambda x: x.T),
    "strided tokens": ((7, 2), lambda x: x[::2, 1]),
    "strided features": ((4, 9), lambda x: x[..., 2]),
    "expanded": ((1, 1), lambda x: x.expand(4, 3, -1)),
    "expanded features": ((6,), lambda x: x[:, :1].expand(-1, 9)),
}
PROBES = {
    "contiguous": lambda shape: randn(*shape),
    "one number": lambda shape: torch.ones((), dtype=FP64).expand(shape),
    "the same for all tokens": lambda shape: randn(shape[-1]).expand(shape),
    "transposed": lambda shape: randn(*shape[::-1]).permute(*range(len(shape))[::-1]),
    "strided": lambda shape: randn(*shape, 2)[..., 0],
}


@pytest.mark.parametrize(("dtype", "layout", "probe"), pairs([FP64, BF16], LAYOUTS, PROBES))
def test_layouts(dtype, layout, probe):
    shape, view = LAYOUTS[layout]
    for form, transposed in zip(FORMS, [True, False], strict=True):
        # Conv1D stores W0 transposed
        problem = Problem(*shape, dtype=dtype, view=view, transposed=transposed)
        tokens = problem.view(problem.leaves["x"]).shape[:-1]
        # the dtype is set before the layout is made: a cast would make it contiguous
        check(problem, form, probe=PROBES[probe]((*tokens, 7)).to(dtype))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("dtype", [FP64, BF16])
@pytest.mark.parametrize("probe", PROBES)
def test_the_base_layers_output_gets_its_gradient(probe, dtype, layout):
    """d base_out = c * g for any strides of both; b counts once in base_out and 1 - c times outside of it."""
    problem = Problem(2, 3, dtype=dtype)
    x, A, B, c, bias = (part.detach() for part in problem.parts())
    leaf = F.linear(x, problem.weight, bias)
    base_out = {
        "contiguous": leaf,
        "transposed": leaf.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": torch.stack([leaf, leaf], dim=-1)[..., 0],
        "expanded": leaf[:1, :1].expand(2, 3, -1),
    }[layout]
    base_out.requires_grad_()
    bias.requires_grad_()
    y = subject.linear(x, A, B, c, S, bias=bias, base_out=base_out, base_product=problem.base_product)
    low_rank = S * x.double() @ A.double().T @ B.double().T
    truth = c.double() * (base_out.double() + low_rank - bias.double()) + bias.double()
    assert distance(y, truth) <= 4 * ROUNDING[dtype]
    g = PROBES[probe](y.shape).to(dtype)
    d_base, d_bias = torch.autograd.grad(y, (base_out, bias), g)
    assert distance(d_base, c.double() * g.double()) <= 2 * ROUNDING[dtype]
    assert distance(d_bias, (1 - c.double()) * g.double().sum((0, 1))) <= 2 * ROUNDING[dtype]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
# rows with c = 0
@pytest.mark.parametrize("zeros", [[], [1], [0, 1, 2]])
def test_gradcheck(form, bias, zeros):
    problem = Problem(4, width=5, out=3, r=2, bias=bias)
    x, A, B, c, b = problem.parts()
    inputs = [x, A, B, c.detach().index_fill(0, torch.tensor(zeros, dtype=torch.int64), 0.0).requires_grad_()]
    inputs += [b] if bias else []

    def function(x, A, B, c, bias=None):
        if form == "weight":
            return subject.linear(x, A, B, c, S, weight=problem.weight, bias=bias)
        base_out = F.linear(x, problem.weight, bias)
        return subject.linear(x, A, B, c, S, bias=bias, base_out=base_out, base_product=problem.base_product)

    # the first pass over a graph reads y, later ones compute it again: equal to rounding
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12)


NAMES = ["x", "A", "B", "m", "bias"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("needed", [names for k in range(1, 6) for names in combinations(NAMES, k)], ids="-".join)
def test_frozen_inputs(needed, form):
    problem = Problem(3, 5)
    probe = randn(3, 5, 7, seed=9)
    truth, leaves = problem.truth()
    expected = gradients(truth, leaves, probe)
    problem.only(*needed)
    products = Products(problem.weight)
    if form == "weight":
        y = problem.y()
    else:
        # without x or b, only the function's own gradients are left in the graph
        y = problem.y("base_out")
    with products:
        y.backward(probe)
    # the one for dx, which is autograd's own in the other form
    assert products.count == ("x" in needed)
    assert not problem.products
    for name, leaf in problem.leaves.items():
        if name in needed:
            assert distance(leaf.grad, expected[name]) <= FLOOR[FP64], name
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_train_makes_no_graph(form):
    y = Problem(3).only().y(form)
    assert y.grad_fn is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [5, CHUNK + 1])
def test_autocast(n, form, bias):
    problem = Problem(2, n, dtype=FP32, bias=bias)
    probe = randn(2, n, 7, seed=9).to(BF16).float()
    truth, leaves = problem.truth()
    expected = gradients(truth, leaves, probe)
    with torch.autocast("cpu", dtype=BF16):
        y, eager = problem.y(form), problem.eager(form)
    assert y.dtype == BF16
    assert distance(y, truth) <= 2 * distance(eager, truth) + FLOOR[BF16]
    naive = problem.gradients(eager, probe)
    with torch.autocast("cpu", dtype=BF16):
        inside = problem.gradients(y, probe, retain_graph=True)
        y = problem.y(form)
    found = problem.gradients(y, probe)
    for name, grad in found.items():
        assert grad.dtype == FP32
        assert torch.equal(grad, inside[name]), name
        allowed = 2 * distance(naive[name], expected[name]) + FLOOR[BF16]
        assert distance(grad, expected[name]) <= allowed, name


@pytest.mark.parametrize("form", FORMS)
def test_autocast_leaves_float64_alone(form):
    problem = Problem(5)
    with torch.autocast("cpu", dtype=BF16):
        y = problem.y(form)
        check(problem, form, y=y)


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("change", [False, True])
def test_autocast_of_a_base_layer_at_hand_as_a_product(change, x_dtype):
    """base_product is the base layer itself, whose dtypes fit under autocast only where x comes from another layer."""
    problem = Problem(5, dtype=FP32)
    x, A, B, c, bias = problem.parts()
    x = x.detach().to(x_dtype).requires_grad_()
    base = nn.Linear(9, 7)
    base.weight, base.bias = nn.Parameter(problem.weight, requires_grad=False), nn.Parameter(bias.detach())
    m = problem.leaves["m"]

    def base_product(x, index):
        out = base(x).detach() - base.bias.detach()
        return out if index is None else out[..., index]

    probe = randn(5, 7, seed=9).to(BF16)
    with torch.autocast("cpu", dtype=BF16):
        y = subject.linear(x, A, B, c, S, bias=base.bias, base_out=base(x), base_product=base_product)
        out = y.mul_(2.0) if change else y * 2.0
    (found,) = torch.autograd.grad(out, m, probe)
    truth, leaves = problem.truth()
    expected = gradients(2 * truth, leaves, probe)["m"]
    with torch.autocast("cpu", dtype=BF16):
        (naive,) = torch.autograd.grad(2 * problem.eager("base_out"), m, probe.float())
    assert distance(found, expected) <= 2 * distance(naive, expected) + FLOOR[BF16]


@pytest.mark.parametrize(("dtypes", "form", "bias", "n"), pairs(DTYPES, FORMS, [False, True], [0, 1, 600]))
def test_evaluation_equals_training(dtypes, form, bias, n):
    dtype, factors = dtypes
    for shape, amp in product([(n,), (2, n)], [False, True]):
        problem = Problem(*shape, dtype=dtype, factors=factors, bias=bias)
        with torch.autocast("cpu", dtype=BF16, enabled=amp):
            expected = problem.y(form)
            x, A, B, c, b = problem.parts()
            with torch.no_grad(), Made() as made:
                base_out = F.linear(x, problem.weight, b)
                base = {"weight": problem.weight} if form == "weight" else {"base_out": base_out}
                kept = None if base_out is None else base_out.clone()
                # the order of the factors of which training makes the same bits
                amp_dtype = BF16 if amp and dtype is not FP64 else dtype
                alpha = 1.0 if by_kernels(amp_dtype) else S
                y = subject.linear_eval(x, A, fold(B, c, S / alpha), c, bias=b, alpha=alpha, **base)
        assert y.grad_fn is None
        assert y.dtype == expected.dtype
        # training composes the weight, evaluation does not
        if form == "weight" and n == 600 and dtype in (FP64, FP32):
            assert distance(y, expected) <= FLOOR[dtype]
        else:
            assert torch.equal(y, expected)
        # Triton's interpreter leaves reference cycles
        gc.collect()
        # the base layer's output is not written to
        assert torch.equal(base_out, kept)
        assert made.alive(y, base_out, kept, x, A, B, c, problem.weight, *[b] * bias) == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "factors"), DTYPES)
def test_an_adapter_that_changes_nothing_gives_the_base_output_bit_for_bit(dtype, factors, form, bias):
    problem = Problem(5, dtype=dtype, factors=factors, bias=bias)
    x, A, B, c, b = problem.parts()
    base_out = F.linear(x, problem.weight, b)
    base = {"weight": problem.weight} if form == "weight" else {"base_out": base_out}
    with torch.no_grad():
        c.fill_(1)
        B.zero_()
        assert torch.equal(subject.linear_eval(x, A, fold(B, c, S), c, bias=b, **base), base_out)
        assert not torch.equal(subject.linear_eval(x, A, fold(B, 2 * c, S), 2 * c, bias=b, **base), base_out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_of_layouts(layout):
    shape, view = LAYOUTS[layout]
    for dtype, form in product([FP64, BF16], FORMS):
        problem = Problem(*shape, dtype=dtype, view=view, transposed=True)
        expected = problem.y(form)
        x, A, B, c, b = problem.parts()
        with torch.inference_mode():
            base = {"weight": problem.weight}
            if form == "base_out":
                base = {"base_out": F.linear(x, problem.weight, b)}
            y = subject.linear_eval(x, A, fold(B, c, S), c, bias=b, **base)
        assert y.shape == expected.shape
        assert distance(y, expected) <= FLOOR[dtype]


# Triton's interpreter runs in one thread
@pytest.mark.implementation("torch")
def test_threads_do_not_share_anything():
    """Two layers of the same sizes trained at once, long enough in each product to meet."""
    n, failures = 2 * CHUNK + 3, []
    barrier = threading.Barrier(2, timeout=20)

    def train(seed):
        try:
            problem = Problem(n, width=33, out=65, dtype=BF16, seed=100 * seed)
            probe = randn(n, 65, seed=seed).to(BF16)
            truth, leaves = problem.truth()
            expected = gradients(truth, leaves, probe)
            naive = problem.gradients(problem.eager(), probe)
            barrier.wait()
            for _ in range(15):
                found = problem.gradients(problem.y(), probe)
                for name, grad in found.items():
                    allowed = 2 * distance(naive[name], expected[name]) + FLOOR[BF16]
                    assert distance(grad, expected[name]) <= allowed, name
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
