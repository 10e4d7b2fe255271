"""DoRA's linear layer as one autograd function against the float64 reference: values, gradients, and what it keeps."""

import gc
import threading
from contextlib import contextmanager, nullcontext
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dora_peft import reference
from dora_peft.ops import choice, kept_output
from dora_peft.ops import linear as subject

S = 0.7
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [(FP64, FP64), (FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]  # of the base, of A and B
FORMS = ["weight", "base_out"]
LENGTHS = [0, 1, 2, subject.CHUNK - 1, subject.CHUNK, subject.CHUNK + 1, 2 * subject.CHUNK + 3]
# what a result may be off beyond twice the eager path's own error, relative to its norm
FLOOR = {FP64: 1e-12, FP32: 1e-6, BF16: 2**-8, FP16: 2**-11}
ROUNDING = {FP64: 2**-53, FP32: 2**-24, BF16: 2**-8, FP16: 2**-11}  # the largest relative error of one


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every fresh buffer is full of NaN, in every test of this file."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=FP64)


class Problem:
    """A layer's tensors: the leaves x, A, B, m and b (None without bias), and the frozen W0.

    `view` turns the leaf x into what the layer is given, for odd layouts.
    """

    def __init__(
        self, *shape, width=9, out=7, r=3, dtype=FP64, factors=None, bias=True, seed=0, view=None, transposed=False
    ):
        factors, self.wide = factors or dtype, FP64 if dtype is FP64 else FP32
        self.weight = randn(out, width, seed=seed).to(dtype) / width**0.5
        if transposed:
            self.weight = self.weight.T.contiguous().T
        A, B = randn(r, width, seed=seed + 1) / width**0.5, randn(out, r, seed=seed + 2)
        A, B = A.to(factors), B.to(factors)
        norm = reference.weight_norm(self.weight.double(), A.double(), B.double(), S)
        self.norm = norm.to(self.wide)
        m = (norm * (0.5 + torch.rand(out, generator=seeded(seed + 3)))).to(self.wide)
        self.leaves = {"x": randn(*shape, width, seed=seed + 4).to(dtype), "A": A, "B": B, "m": m}
        self.leaves["bias"] = randn(out, seed=seed + 5).to(dtype) if bias else None
        self.view = view or (lambda x: x)
        self.products = []  # the rows that each call of base_product asked for
        self.only("x", "A", "B", "m", "bias")

    def only(self, *names):
        """Let these leaves alone need a gradient."""
        for name, leaf in self.leaves.items():
            if leaf is not None:
                leaf.requires_grad_(name in names)
        return self

    def set(self, **values):
        """Other values for some leaves."""
        with torch.no_grad():
            for name, value in values.items():
                self.leaves[name].copy_(value)
        return self

    def parts(self):
        """x, A, B, c and b as the layer sees them."""
        x, A, B, m, bias = self.leaves.values()
        return self.view(x), A, B, m / self.norm, bias

    def base_product(self, x, index=None):
        self.products.append(index)
        weight = self.weight if index is None else self.weight[index]
        return F.linear(x.to(weight.dtype), weight)

    def y(self, form="weight", *, x=None, dropout_p=0.0):
        """The subject's output."""
        own_x, A, B, c, bias = self.parts()
        x = own_x if x is None else x
        if form == "weight":
            base = {"weight": self.weight}
        else:
            base = {"base_out": F.linear(x, self.weight, bias), "base_product": self.base_product}
        return subject.linear(x, A, B, c, S, bias=bias, dropout_p=dropout_p, **base)

    def eager(self, form="weight", drop=None):
        """The same by plain operations in the base's dtype, with c in fp32, as a careful layer without the function."""
        x, A, B, c, bias = self.parts()
        dtype = x.dtype
        z = F.linear(x, self.weight) if form == "weight" or bias is None else F.linear(x, self.weight, bias) - bias
        dropped = x if drop is None else x * drop.to(dtype)
        z = z + S * F.linear(F.linear(dropped, A.to(dtype)), B.to(dtype))
        y = (c * z).to(dtype)
        return y if bias is None else y + bias

    def truth(self, drop=None):
        """The reference's output in float64, and its leaves."""
        leaves = {n: None if t is None else t.detach().double().requires_grad_() for n, t in self.leaves.items()}
        x, A, B, m, bias = leaves.values()
        x = self.view(x)
        dropped = None if drop is None else x * drop
        return reference.dora_linear(x, self.weight.double(), A, B, m, S, bias, dropped=dropped), leaves

    def gradients(self, y, probe, **options):
        return gradients(y, self.leaves, probe, **options)


def by_kernels(dtype):
    return choice.uses_kernels(torch.device("cpu"), dtype)


def drawn_mask(shape, p, dtype):
    """The mask that the next layer draws, and the exact probability to keep an element."""
    if not by_kernels(dtype):
        return subject.dropout_mask(shape, p, torch.device("cpu"))
    from dora_peft.ops.kernels import dropout as dropout_kernels

    seed = dropout_kernels.draw_seed(torch.device("cpu"))
    return dropout_kernels.drawn_mask(shape, seed, p, torch.device("cpu")), dropout_kernels.threshold(p)[1]


def gradients(y, leaves, probe, **options):
    """By name, of the sum of y * probe."""
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    found = torch.autograd.grad(y, list(leaves.values()), probe.to(y.dtype), **options)
    return dict(zip(leaves, found, strict=True))


def backward(problem, loss):
    """The gradients that loss.backward() leaves: reentrant checkpoints refuse autograd.grad."""
    for leaf in problem.leaves.values():
        if leaf is not None:
            leaf.grad = None
    loss.backward()
    return {name: leaf.grad for name, leaf in problem.leaves.items() if leaf is not None}


def distance(found, expected):
    """Relative to the norm of what is expected, absolute where that is 0."""
    assert found.shape == expected.shape
    size = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() / (size or 1)


def check(problem, form="weight", *, y=None, eager=None, probe=None, drop=None):
    """Forward and all gradients against the reference, allowing what the eager path itself errs in the same dtype."""
    y = problem.y(form) if y is None else y
    dtype = problem.weight.dtype
    assert y.dtype == dtype
    probe = randn(*y.shape, seed=9).to(dtype) if probe is None else probe
    truth, leaves = problem.truth(drop)
    eager = problem.eager(form, drop) if eager is None else eager
    floor = FLOOR[dtype] * (2 if by_kernels(dtype) else 1)  # which round c * g as well
    assert y.shape == truth.shape
    assert distance(y, truth) <= 2 * distance(eager, truth) + floor
    expected, naive = gradients(truth, leaves, probe), problem.gradients(eager, probe)
    found = problem.gradients(y, probe)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad.dtype == problem.leaves[name].dtype
        allowed = 2 * distance(naive[name], expected[name]) + floor
        assert distance(grad, expected[name]) <= allowed, name


def assert_equal_gradients(found, expected, floor=FLOOR[FP32]):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert distance(grad, expected[name]) <= floor, name


class Products(TorchDispatchMode):
    """Counts the matrix products with something of this weight's shape: W0 itself, or c (W0 + s B A)."""

    def __init__(self, weight):
        super().__init__()
        self.shape, self.count = sorted(weight.shape), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__ or "linear" in func.__name__:
            factors = args[1:3] if "addmm" in func.__name__ else args[:2]
            self.count += any(sorted(factor.shape) == self.shape for factor in factors)
        return func(*args, **(kwargs or {}))


class Made(TorchDispatchMode):
    """Remembers every tensor that is made, without keeping it alive."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self, *others):
        """Bytes of each tensor made here that still exists, those of `others` left out."""
        known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in others}
        return sorted(
            size for ref, size in self.storages.items() if size and not ref.expired() and ref.cdata not in known
        )


def identity_hooks():
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@contextmanager
def no_garbage_collection():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ---- forward and gradients


def test_fresh_buffers_are_poisoned():
    """Without it the tests below would not notice that uninitialised memory is read."""
    x = torch.ones(3, 5)
    for fresh in (torch.empty(7), torch.empty_like(x), x.new_empty(4, dtype=FP64), torch.empty_like(x, dtype=BF16)):
        assert fresh.isnan().all()


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "factors"), DTYPES)
def test_forward_and_gradients(dtype, factors, form, bias, n):
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


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP64, BF16])
def test_layouts(dtype, layout, probe):
    shape, view = LAYOUTS[layout]
    for form, transposed in zip(FORMS, [True, False], strict=True):  # Conv1D stores W0 transposed
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
@pytest.mark.parametrize("zeros", [[], [1], [0, 1, 2]])  # rows with c = 0
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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [FP64, FP32])
@pytest.mark.parametrize("n", [15, 16, 200])  # around the number from which the weight is composed: 1.5 * 33 * 29 / 62
@pytest.mark.implementation("torch")
def test_composed_weights(n, dtype, transposed):
    for given, bias in product([False, True], repeat=2):
        problem = Problem(n, width=33, out=29, dtype=dtype, bias=bias, transposed=transposed, seed=1)
        x, A, B, c, b = problem.parts()
        assert subject.composes(x, problem.weight) == (n >= 24)
        direction = subject.compose_weight(problem.weight, A.detach(), B.detach(), S) if given else None
        before = problem.weight.clone()
        y = subject.linear(x, A, B, c, S, weight=problem.weight, bias=b, direction=direction if n >= 24 else None)
        check(problem, y=y)
        assert torch.equal(problem.weight, before)
        if given:  # what the caller computed is what would have been computed
            assert torch.equal(y, subject.linear(x, A, B, c, S, weight=problem.weight, bias=b))


@pytest.mark.implementation("torch")
def test_what_is_composed():
    x = torch.randn(4096, 64)
    assert subject.composes(x, torch.randn(48, 64))
    assert not subject.composes(x.bfloat16(), torch.randn(48, 64).bfloat16())  # would round B A away
    assert not subject.composes(x.bfloat16(), torch.randn(48, 64))
    assert not subject.composes(x[:32], torch.randn(48, 64))
    assert not subject.composes(x, torch.empty(subject.COMPOSED_BYTES // 256 + 1, 64))
    with torch.autocast("cpu"):
        assert not subject.composes(x, torch.randn(48, 64))


@pytest.mark.parametrize("shape", [(0, 64, 64), (1, 2048, 1025), (64, 256, 129), (700, 65, 63), (300, 128, 96)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_products_by_either_library(shape, layout, monkeypatch):
    n, width, out = shape
    x, weight, bias = torch.randn(n, width), torch.randn(out, width) / width**0.5, torch.randn(out)
    if layout == "columns":
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    expected = x.double() @ weight.double().T
    for library in {subject._ONEDNN, None}:
        monkeypatch.setattr(subject, "_ONEDNN", library)
        assert distance(subject.multiply(x, weight), expected) <= FLOOR[FP32]
        assert distance(subject.multiply(x, weight, bias), expected + bias) <= FLOOR[FP32]


def test_few_tokens_give_the_bits_of_the_base_layer():
    """As PEFT's tests expect of an adapter that changes nothing yet."""
    x, weight = torch.randn(10, 1000), torch.randn(1000, 1000)
    ones, zeros = torch.ones(1000), torch.zeros(1000, 3)
    y = subject.linear(x, torch.randn(3, 1000), zeros, ones, S, weight=weight)
    assert torch.equal(y, F.linear(x, weight))


@pytest.mark.parametrize(("name", "found"), [("AMD EPYC 9B14", True), ("Intel(R) Xeon(R) Platinum 8481C", False)])
def test_another_library_than_torchs_choice_is_for_amd(name, found, monkeypatch):
    for backend in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    assert (subject._find_onednn() is not None) == found
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert subject._find_onednn() is None


# ---- frozen inputs


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
    else:  # without x or b, only the function's own gradients are left in the graph
        y = problem.y("base_out")
    with products:
        y.backward(probe)
    assert products.count == ("x" in needed)  # the one for dx, which is autograd's own in the other form
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


# ---- the gradient of m where y does not determine it


def magnitude_errors(problem, probe, gradient):
    """Of dm [out] per row, in units of sqrt(sum_n (g z)^2): where each term has a relative error e at random, e."""
    m = problem.leaves["m"].detach().double()
    truth, leaves = problem.truth()
    expected = gradients(truth, leaves, probe)["m"]
    A, B = (problem.leaves[name].detach().double() for name in "AB")
    x = problem.leaves["x"].detach().double()
    z = x @ (problem.weight.double() + S * B @ A).T / problem.norm.double()
    assert m.shape == gradient.shape == expected.shape
    return (gradient.double() - expected).abs() / (probe.double() * z).square().sum(0).sqrt()


def plain_magnitude_gradient(problem, y, probe):
    """dm from y alone, which is exact in exact arithmetic."""
    _, _, _, c, bias = problem.parts()
    y = y.to(problem.wide) if bias is None else y.to(problem.wide) - bias
    return ((probe * y).sum(0) / c / problem.norm).detach()


def hard_problem(dtype, *, c=None, ratio=None, seed=0):
    """Every other row is hard: c as given, or a bias `ratio` times the size of the rest."""
    problem = Problem(300, width=24, out=12, dtype=dtype, bias=ratio is not None, seed=seed)
    hard = torch.arange(12) % 2 == 1
    if c is not None:
        problem.set(m=torch.where(hard, c * problem.norm, problem.leaves["m"]))
    if ratio is not None:
        without, bias = problem.y().detach().double() - problem.leaves["bias"].double(), problem.leaves["bias"]
        size = without.square().mean(0).sqrt()
        problem.set(bias=torch.where(hard, ratio * size * bias.sign(), 0.1 * size))
    return problem, hard


# Digits of z that may be lost before it is computed again: 2 binary ones in half precision; in wider types 3 decimal
# ones, and y is rounded twice there.
GIVEN_UP = {FP64: 2000, FP32: 2000, BF16: 4, FP16: 4}


def assert_good(errors, problem, probe, hard):
    """At hard and at other rows, each at most twice the eager path's, which keeps z, and the digits given up."""
    eager = magnitude_errors(problem, probe, problem.gradients(problem.eager(), probe)["m"])
    floor = GIVEN_UP[problem.weight.dtype] * ROUNDING[problem.weight.dtype]
    for rows in (hard, ~hard):
        assert rms(errors[rows]) <= 2 * rms(eager[rows]) + floor


def rms(values):
    return values.square().mean().sqrt()


HARD = [
    *[(dtype, {"c": 0.0}) for dtype in (FP64, FP32, BF16, FP16)],
    *[(dtype, {"c": 1e-42}) for dtype in (FP32, BF16)],
    *[(FP16, {"c": c}) for c in (1e-6, -1e-6, 1e-8)],
    *[(dtype, {"ratio": ratio}) for dtype in (BF16, FP16) for ratio in (1e2, 1e3, 1e4)],
    *[(FP32, {"ratio": ratio}) for ratio in (1e4, 1e5)],
]
# where y still tells enough, or just not
FAIR = [
    *[(dtype, {"c": c}) for dtype in (FP64, FP32, BF16) for c in (1e-3, -1.0, 1e-10, 1e-25, 1e-36)],
    *[(FP16, {"c": c}) for c in (-1.0, 0.1, 2**-7.9, 2**-8.1, 1e-3, 1e-4, 1e-5)],
    *[(dtype, {"ratio": ratio}) for dtype in (FP64, FP32, BF16, FP16) for ratio in (1, 2, 3, 5, 10)],
    *[(FP32, {"ratio": ratio}) for ratio in (1e2, 1e3)],
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "case"), [*HARD, *FAIR])
def test_magnitude_gradient_of_hard_rows(dtype, case, form):
    problem, hard = hard_problem(dtype, **case)
    probe = randn(300, 12, seed=9).to(dtype)
    found = problem.gradients(problem.y(form), probe)["m"]
    assert_good(magnitude_errors(problem, probe, found), problem, probe, hard)


@pytest.mark.parametrize(("dtype", "case"), HARD)
def test_the_plain_formula_fails_at_hard_rows(dtype, case):
    """What makes the test above one that can fail, and only the hard rows cost a product."""
    problem, hard = hard_problem(dtype, **case)
    probe = randn(300, 12, seed=9).to(dtype)
    y = problem.y("base_out")
    errors = magnitude_errors(problem, probe, plain_magnitude_gradient(problem, problem.y(), probe))
    with pytest.raises(AssertionError):
        assert_good(errors, problem, probe, hard)
    assert_good(errors.masked_fill(hard, 0), problem, probe, hard)  # the other rows are not to blame
    problem.gradients(y, probe)
    (index,) = problem.products
    assert index.tolist() == hard.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_large_token_does_not_hide_that_the_others_are_lost(dtype):
    """The first token's activations are often far larger than all others', and it may get no gradient."""
    ratio, size = (1e5, 1e3) if dtype is FP32 else (30, 100)
    problem, hard = hard_problem(dtype, ratio=ratio)
    with torch.no_grad():
        problem.leaves["x"][0] *= size
    probe = randn(300, 12, seed=9).to(dtype)
    probe[0] = 0
    found = problem.gradients(problem.y(), probe)["m"]
    assert_good(magnitude_errors(problem, probe, found), problem, probe, hard)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 129])
def test_a_drowned_row_is_noticed_for_any_number_of_tokens(n):
    problem = Problem(n, dtype=BF16).set(bias=torch.full((7,), 1e4))
    y = problem.y("base_out")
    problem.gradients(y, randn(n, 7).to(BF16))
    assert [index.tolist() for index in problem.products] == ([list(range(7))] if n else [])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [0, 1])
def test_rows_without_magnitude_of_few_tokens(n, form):
    problem = Problem(n)
    problem.set(m=problem.leaves["m"].detach().index_fill(0, torch.tensor([2, 5]), 0.0))
    check(problem, form)


# ---- the next operation changes y in place


def overwrite(y):
    y[..., :3] = 2.0
    return y


def add_flat(y):
    y.view(-1).add_(3.0)
    return y


def change_unseen(y):
    with torch.no_grad():
        y.mul_(-2.0)
    return y


CONSUMERS = {
    "relu_": lambda y: y.relu_(),
    "mul_": lambda y: y.mul_(0.5),
    "overwrite": overwrite,
    "add_flat": add_flat,
    "change_unseen": change_unseen,
}
READERS = {"relu": torch.relu, "clone": torch.clone, "mul": lambda y: y * 0.5}


def under(context):
    def apply(function, x):
        with context():
            return function(x)

    return apply


def half(function, x):
    with torch.autocast("cpu", dtype=BF16):
        return function(x)


def recomputed(function, x):
    return checkpoint(function, x, use_reentrant=False)


SURROUNDINGS = {
    "plain": under(nullcontext),
    "offloaded": under(save_on_cpu),
    "hooks": under(identity_hooks),
    "checkpoint": recomputed,
    "reentrant checkpoint": lambda function, x: checkpoint(function, x, use_reentrant=True),
    "autocast": half,
    "checkpoint under autocast": lambda function, x: half(lambda x: recomputed(function, x), x),
}


def small_bias(*shape):
    """In bf16 as well, no row of these few tokens is drowned by its bias."""
    problem = Problem(*shape, dtype=FP32)
    return problem.set(bias=0.01 * problem.leaves["bias"])


def gradients_after(problem, form, consumer, surroundings, inside):
    """With the consumer within the surroundings of the layer, or after them."""

    def layer(x):
        return problem.y(form, x=x)

    x, apply = problem.leaves["x"], SURROUNDINGS[surroundings]
    out = apply(lambda x: consumer(layer(x)), x) if inside else consumer(apply(layer, x))
    problem.products.clear()
    return backward(problem, (out * randn(*out.shape, seed=9).to(out.dtype)).sum())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_the_next_operation_may_change_the_output(consumer, surroundings, inside, form):
    change = CONSUMERS[consumer]
    for shape in [(4,), (2, 3)]:
        problem = small_bias(*shape)
        found = gradients_after(problem, form, change, surroundings, inside)
        if form == "base_out":
            # computed again, once and for all rows; what is after a reentrant checkpoint never sees the layer's own y
            own = inside or surroundings != "reentrant checkpoint"
            assert problem.products == [None] * own
        expected = gradients_after(problem, form, lambda y: change(y.clone()), surroundings, inside)
        assert not problem.products
        assert_equal_gradients(found, expected, 2 * FLOOR[BF16 if "autocast" in surroundings else FP32])


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("reader", READERS)
def test_an_unchanged_output_is_not_computed_again(reader, surroundings, inside):
    problem = small_bias(2, 3)
    found = gradients_after(problem, "base_out", READERS[reader], surroundings, inside)
    assert not problem.products
    expected = gradients_after(problem, "weight", READERS[reader], surroundings, inside)
    assert_equal_gradients(found, expected, 2 * FLOOR[BF16 if "autocast" in surroundings else FP32])


@pytest.mark.parametrize("context", [nullcontext, save_on_cpu, identity_hooks])
@pytest.mark.parametrize("n", [2, 20])
@pytest.mark.implementation("torch")
def test_products_with_the_weight(n, context):
    """One forward, one for dx, and one more where y was changed and m is trained."""
    for change, trains_m in product([False, True], [True, False]):
        problem = Problem(n)
        assert subject.composes(problem.leaves["x"], problem.weight) == (n == 20)
        problem.only("x", "A", "B", *["m"] * trains_m)
        forward, back = Products(problem.weight), Products(problem.weight)
        with context(), forward:
            y = problem.y()
        if change:
            y.mul_(2.0)
        with back:
            y.sum().backward()
        expected = 1 + (change and trains_m)
        assert (forward.count, back.count) == (1, expected)


def test_a_change_through_an_alias_is_seen():
    problem = Problem(6)
    y = problem.y()
    loss = (y * 2).sum()
    y.detach().zero_()
    truth, leaves = problem.truth()
    expected = gradients(truth, leaves, torch.full((6, 7), 2.0))
    assert_equal_gradients(backward(problem, loss), expected, FLOOR[FP64])


# ---- passes over the graph


@pytest.mark.parametrize("context", [nullcontext, save_on_cpu, identity_hooks])
@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_two_passes_over_a_graph(form, change, context):
    problem = Problem(6)
    with context():
        y = problem.y(form)
        out = y.mul_(2.0) if change else y * 2.0
    del y
    probe = randn(6, 7, seed=9)
    truth, leaves = problem.truth()
    expected = gradients(2 * truth, leaves, probe)
    for last in (False, False, True):
        found = problem.gradients(out, probe, retain_graph=not last)
        assert_equal_gradients(found, expected, FLOOR[FP64])
    with pytest.raises(RuntimeError, match="second time"):
        problem.gradients(out, probe)


@pytest.mark.parametrize("context", [nullcontext, identity_hooks])
def test_a_second_pass_over_a_freed_graph_raises(context):
    """The error is the function's own: no other node of this graph saves anything."""
    problem = Problem(6)
    with context():
        y = problem.y()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("loss", [lambda y: y.square().sum(), lambda y: y.sum()])
@pytest.mark.parametrize("form", FORMS)
def test_a_second_derivative_raises(form, loss):
    problem = Problem(6)
    if form == "base_out":  # whose own branch is twice differentiable, so x would have a derivative without the rest
        problem.only("A", "B", "m")
    found = problem.gradients(loss(problem.y(form)), torch.ones(()), create_graph=True)
    for name, grad in found.items():
        if name == "m":  # dm = dc / v
            assert grad.shape == (7,)
        with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
            grad.sum().backward(retain_graph=True)


# ---- what is kept


@pytest.mark.parametrize("context", [nullcontext, save_on_cpu, identity_hooks])
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_the_output_is_released_after_backward(form, shape, context):
    problem = Problem(*shape)
    probe = randn(*shape, 7, seed=9)
    with no_garbage_collection():
        with context():
            y = problem.y(form)
        storage = StorageWeakRef(y.untyped_storage())
        loss = (y * probe).sum()
        del y
        if context is not save_on_cpu:  # which keeps a copy
            assert not storage.expired()  # kept for backward, by nothing else
        loss.backward()
        assert loss.grad_fn is not None
        assert storage.expired()


def copying_hooks():
    return saved_tensors_hooks(torch.clone, lambda tensor: tensor)


@pytest.mark.parametrize("context", [nullcontext, copying_hooks])  # torch's own x.exp() leaks where hooks do not copy
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("when", ["before backward", "between two", "changed"])
def test_no_reference_cycle_keeps_the_output(form, context, when):
    problem = Problem(2, 3)
    with no_garbage_collection():
        with context():
            y = problem.y(form, dropout_p=0.5)
        storage = StorageWeakRef(y.untyped_storage())
        if when == "between two":
            y.sum().backward(retain_graph=True)
        if when == "changed":
            y.mul_(2.0)
        assert not storage.expired()
        del y
        assert storage.expired()


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("surroundings", ["plain", "autocast"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("n", [5, subject.CHUNK + 1])
def test_what_is_kept_for_backward(n, dtype, form, surroundings, dropout_p):
    """y and u, some of y's elements again, and for dropout a byte an element of x, by kernels nothing: no copy of x,
    nothing of W0's size."""
    problem = Problem(n, width=33, out=29, dtype=dtype)
    x, A, B, c, bias = problem.parts()
    with torch.autocast("cpu", dtype=BF16, enabled=surroundings == "autocast"):
        base_out = F.linear(x, problem.weight, bias).detach().requires_grad_()
        base = {"weight": problem.weight} if form == "weight" else {"base_out": base_out, "base_product": None}
        with no_garbage_collection(), Made() as made:
            y = subject.linear(x, A, B, c, S, bias=bias, dropout_p=dropout_p, **base)
    assert y.dtype == (BF16 if surroundings == "autocast" and dtype is not FP64 else dtype)
    mask = [] if by_kernels(dtype) else [n * 33] * (dropout_p > 0)  # drawn anew from its seed
    if by_kernels(dtype):
        gc.collect()  # Triton's interpreter leaves reference cycles
    sample = [part.numel() * y.itemsize for part in kept_output._parts(y, 0, 0)]
    assert sum(sample) <= (2048 + 1024) * y.itemsize
    expected = [n * 29 * y.itemsize, n * 3 * y.itemsize, *sample, *mask]
    given = (x, A, B, c, bias, problem.weight, base_out)
    assert made.alive(*given) == sorted(expected)
    assert made.alive(*given, y) == sorted(expected[1:])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_what_goes_through_hooks(form, dropout_p):
    """The same: x, the parameters and c as they are given, not copies; y, its sample and where that is from; u; mask.
    W0 stays where it is."""
    problem = Problem(2, 5, width=33, out=29, dtype=BF16, factors=FP32)
    x, A, B, c, bias = problem.parts()
    base_out = F.linear(x, problem.weight, bias).detach()
    base = {"weight": problem.weight} if form == "weight" else {"base_out": base_out, "base_product": None}
    packed = []
    with saved_tensors_hooks(lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor):
        y = subject.linear(x, A, B, c, S, bias=bias, dropout_p=dropout_p, **base)
    given = [tensor.data_ptr() for tensor in (x, A, B, c, bias, y)]
    assert sorted(t.data_ptr() for t in packed if t.data_ptr() in given) == sorted(given)
    made = [(tuple(t.shape), t.dtype) for t in packed if t.data_ptr() not in given]
    masks = 0 if by_kernels(BF16) else dropout_p > 0
    sample = [((10, 29), BF16), ((9,), BF16), ((2,), torch.int64)]
    assert sorted(made, key=str) == sorted([((10, 3), BF16), *sample, *[((10, 33), torch.bool)] * masks], key=str)


@pytest.mark.parametrize("context", [nullcontext, identity_hooks])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_base_weight_changed_before_backward_raises(transposed, context):
    problem = Problem(6)
    stored = problem.weight.T.contiguous() if transposed else problem.weight
    problem.weight = stored.T if transposed else stored
    with context():
        y = problem.y()
    stored.mul_(1.0)
    with pytest.raises(RuntimeError, match=r"base weight was changed in place.*\[7, 9\]"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["x", "A", "B", "bias"])
@pytest.mark.parametrize("form", FORMS)
def test_an_input_changed_before_backward_raises(form, name):
    problem = Problem(6)
    y = problem.y(form)
    with torch.no_grad():
        problem.leaves[name].mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_base_weight_made_in_inference_mode():
    """As a model that was loaded there: such tensors have no version and cannot be saved for backward."""
    problem = Problem(6)
    with torch.inference_mode():
        problem.weight = problem.weight.clone()
    y = problem.y()
    probe = randn(6, 7, seed=9)
    found = problem.gradients(y, probe)
    problem.weight = problem.weight.clone()
    truth, leaves = problem.truth()
    assert_equal_gradients(found, gradients(truth, leaves, probe), FLOOR[FP64])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_without_gradients(dropout_p, form, mode):
    problem = Problem(2, 3)
    torch.manual_seed(1)
    expected = problem.y(form, dropout_p=dropout_p)
    torch.manual_seed(1)
    with mode():
        y = problem.y(form, dropout_p=dropout_p)
    assert y.grad_fn is None
    assert torch.equal(y, expected)


# ---- autocast


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [5, subject.CHUNK + 1])
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


# ---- dropout


@pytest.mark.parametrize("p", [0.3, 1.0, 1e-6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16])
def test_dropout(dtype, form, bias, p):
    problem = Problem(3, 5, dtype=dtype, bias=bias)
    torch.manual_seed(1)
    y = problem.y(form, dropout_p=p)
    torch.manual_seed(1)
    mask, kept = drawn_mask(torch.Size([15, 9]), p, dtype)
    assert abs(kept - (1 - p)) <= 2**-17
    drop = mask.view(3, 5, 9).double() / (kept or 1)
    check(problem, form, y=y, drop=drop)


@pytest.mark.parametrize("x_needs_it", [True, False])
def test_dropout_where_the_output_changes(x_needs_it):
    """dm from x again: it needs the dropped u, and 1 / (1 - p) once."""
    problem = Problem(15).only("A", "B", "m", *["x"] * x_needs_it)
    torch.manual_seed(1)
    y = problem.y(dropout_p=0.4)
    torch.manual_seed(1)
    mask, kept = subject.dropout_mask(torch.Size([15, 9]), 0.4, y.device)
    probe = randn(15, 7, seed=9)
    truth, leaves = problem.truth(mask.double() / kept)
    expected = gradients(3 * truth, leaves, probe)
    found = problem.gradients(y.mul_(3.0), probe)
    for name, grad in found.items():
        assert distance(grad, expected[name]) <= FLOOR[FP64], name


def test_everything_dropped_leaves_no_low_rank_part():
    problem = Problem(15)
    problem.y(dropout_p=1.0).square().sum().backward()
    assert not problem.leaves["A"].grad.any()
    assert not problem.leaves["B"].grad.any()
    assert problem.leaves["m"].grad.all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_draws_the_same_mask(form, reentrant):
    problem = Problem(3, 5)
    probe = randn(3, 5, 7, seed=9)
    torch.manual_seed(1)
    expected = backward(problem, (problem.y(form, dropout_p=0.5) * probe).sum())
    torch.manual_seed(1)

    def layer(x):
        return problem.y(form, x=x, dropout_p=0.5)

    y = checkpoint(layer, problem.leaves["x"], use_reentrant=reentrant)
    torch.manual_seed(2)  # what comes between has its own numbers
    assert_equal_gradients(backward(problem, (y * probe).sum()), expected, FLOOR[FP64])


MASKED = torch.Size([501, 799])  # 4 does not divide their product


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_mask_statistics(p):
    """Within 5 standard deviations of independent draws; four neighbours come from one 64-bit number."""
    mask, kept = subject.dropout_mask(MASKED, p, torch.device("cpu"))
    assert mask.dtype == torch.bool
    assert mask.shape == MASKED
    count = mask.numel()
    sigma = (kept * (1 - kept)) ** 0.5
    assert abs(mask.double().mean().item() - kept) < 5 * sigma / count**0.5
    lanes = (mask.flatten()[: count // 4 * 4].view(-1, 4).double() - kept) / sigma
    assert (lanes.mean(0).abs() < 5 / len(lanes) ** 0.5).all()
    following = torch.cat([lanes[:-1], lanes[1:]], dim=1)  # and the next number's
    correlation = following.T @ following / len(following)
    assert (correlation - correlation.diag().diag()).abs().max() < 5 / len(following) ** 0.5


@pytest.mark.parametrize("shape", [(0, 9), (1, 1), (1, 3), (5, 7)])
@pytest.mark.parametrize("p", [1e-9, 0.5, 1 - 1e-9, 1.0])
def test_masks_of_any_size(p, shape):
    mask, kept = subject.dropout_mask(torch.Size(shape), p, torch.device("cpu"))
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert abs(kept - (1 - p)) <= 2**-17
    assert mask.all() or kept < 1
    assert not mask.any() or kept > 0


def test_masks_follow_the_global_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return [subject.dropout_mask(torch.Size([40, 40]), 0.5, torch.device("cpu"))[0] for _ in range(2)]

    (first, second), again = draw(1), draw(1)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, draw(2)[0])


# ---- evaluation


@pytest.mark.parametrize("n", [0, 1, 600])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "factors"), DTYPES)
def test_evaluation_equals_training(dtype, factors, form, bias, n):
    for shape, amp in product([(n,), (2, n)], [False, True]):
        problem = Problem(*shape, dtype=dtype, factors=factors, bias=bias)
        with torch.autocast("cpu", dtype=BF16, enabled=amp):
            expected = problem.y(form)
            x, A, B, c, b = problem.parts()
            with torch.no_grad(), Made() as made:
                base_out = F.linear(x, problem.weight, b)
                base = {"weight": problem.weight} if form == "weight" else {"base_out": base_out}
                kept = None if base_out is None else base_out.clone()
                y = subject.linear_eval(x, A, subject.fold(B, c, S), c, bias=b, **base)
        assert y.grad_fn is None
        assert y.dtype == expected.dtype
        if form == "weight" and n == 600 and dtype in (FP64, FP32):  # training composes the weight, evaluation does not
            assert distance(y, expected) <= FLOOR[dtype]
        else:
            assert torch.equal(y, expected)
        gc.collect()  # Triton's interpreter leaves reference cycles
        assert torch.equal(base_out, kept)  # the base layer's output is not written to
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
        assert torch.equal(subject.linear_eval(x, A, subject.fold(B, c, S), c, bias=b, **base), base_out)
        assert not torch.equal(subject.linear_eval(x, A, subject.fold(B, 2 * c, S), 2 * c, bias=b, **base), base_out)


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
            y = subject.linear_eval(x, A, subject.fold(B, c, S), c, bias=b, **base)
        assert y.shape == expected.shape
        assert distance(y, expected) <= FLOOR[dtype]


# ---- several threads


@pytest.mark.implementation("torch")  # Triton's interpreter runs in one thread
def test_threads_do_not_share_anything():
    """Two layers of the same sizes trained at once, long enough in each product to meet."""
    n, failures = 2 * subject.CHUNK + 3, []
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


# ---- the parts


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_compose(with_bias, dtype, n):
    """Into z itself and elsewhere; in low precision with no rounding but that of the result."""
    wide = FP64 if dtype is FP64 else FP32
    z, u = randn(n, 7, seed=1).to(dtype), randn(n, 3, seed=2).to(dtype)
    c, b = randn(7, seed=3).to(wide), randn(7, seed=4).to(dtype) if with_bias else None
    folded = randn(7, 3, seed=5).to(wide)
    shift = b.double() if with_bias else 0
    expected = c.double() * (z.double() - shift) + u.double() @ folded.double().T + shift
    kept, out = z.clone(), torch.empty_like(z)
    assert subject.compose(z, u, folded, c, b, out=out) is out
    assert torch.equal(z, kept)
    assert subject.compose(z, u, folded, c, b, out=z) is z
    assert torch.equal(z, out)
    rounded = distance(expected.to(dtype), expected)
    assert distance(out, expected) <= (1.01 * rounded + 1e-6 if wide is FP32 else FLOOR[FP64])


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("keep_scaled", [False, True])
def test_scale_and_sum(keep_scaled, dtype, n):
    wide = FP64 if dtype is FP64 else FP32
    g, y, weight = randn(n, 7, seed=1).to(dtype), randn(n, 7, seed=2).to(dtype), randn(7, 9, seed=3).to(dtype)
    c, b = randn(7, seed=4).to(wide), randn(7, seed=5).to(dtype)
    for with_y, with_bias, with_weight in product([False, True], repeat=3):
        result, scaled, sums = subject.scale_and_sum(
            g,
            c,
            y if with_y else None,
            b if with_bias else None,
            weight if with_weight else None,
            keep_scaled=keep_scaled,
        )
        assert (result is not None, scaled is not None, sums is not None) == (with_weight, keep_scaled, with_y)
        rounded = (g.double() * c.double()).to(dtype)
        if scaled is not None:
            assert scaled.dtype == dtype
            assert distance(scaled, rounded) <= 2 * ROUNDING[dtype]
        if result is not None:
            assert result.dtype == dtype
            assert distance(result, rounded.double() @ weight.double()) <= 4 * ROUNDING[dtype]
        if sums is not None:
            terms = g.double() * (y.double() - b.double() * with_bias)
            assert sums.dtype == wide
            error = (sums.double() - terms.sum(0)).abs()
            assert (error <= 4 * n**0.5 * ROUNDING[wide] * terms.norm(dim=0)).all()


def test_scale_and_sum_takes_no_more_than_a_chunk_at_once():
    """On a CPU no temporary is longer than CHUNK tokens, whatever their number."""
    n = 4 * subject.CHUNK + 1
    g, y, weight = randn(n, 40).to(BF16), randn(n, 40).to(BF16), randn(40, 3).to(BF16)
    with Made() as made:
        subject.scale_and_sum(g, torch.ones(40), y, torch.ones(40), weight, keep_scaled=False)
    given = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in (g, y, weight)}
    largest = max(size for ref, size in made.storages.items() if ref.cdata not in given)
    assert largest <= subject.CHUNK * 40 * 4


def test_magnitude_gradient_asks_for_the_lost_rows_only():
    y, g, c = randn(30, 5, seed=1), randn(30, 5, seed=2), torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5], dtype=FP64)
    asked = []

    def z_at(index):
        asked.append(index)
        return torch.full((30, 5 if index is None else len(index)), 3.0, dtype=FP64)

    sums = (g * y).sum(0)
    found = subject.magnitude_gradient(sums, g, y, c, None, z_at)
    kept = [0, 2, 4]
    torch.testing.assert_close(found[kept], (sums / c)[kept])
    torch.testing.assert_close(found[[1, 3]], 3 * g.sum(0)[[1, 3]])
    assert [index.tolist() for index in asked] == [[1, 3]]
    torch.testing.assert_close(subject.magnitude_gradient(None, g, None, c, None, z_at), 3 * g.sum(0))
    assert asked[1:] == [None]
    torch.testing.assert_close(subject.magnitude_gradient(sums, g, y, c.abs() + 1, None, z_at), sums / (c.abs() + 1))
    assert len(asked) == 2


def test_saved_tensor_hooks_are_noticed():
    seen = []
    assert not kept_output.saved_tensor_hooks_active()
    for context in (save_on_cpu, identity_hooks):
        with context():
            assert kept_output.saved_tensor_hooks_active()
        assert not kept_output.saved_tensor_hooks_active()
    x = torch.ones(2, requires_grad=True)
    checkpoint(lambda x: (seen.append(kept_output.saved_tensor_hooks_active()), x * x)[1], x, use_reentrant=False)
    assert seen == [True]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("context", [nullcontext, save_on_cpu, identity_hooks])
def test_a_torch_that_does_not_tell_of_hooks(context, form, monkeypatch):
    """Hooks are assumed then. Results are the same, and a change that no hook hides raises torch's own error."""
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert kept_output.saved_tensor_hooks_active()
    problem = Problem(2, 3)
    with context():
        y = problem.y(form)
    check(problem, form, y=y)
    with context():
        y = problem.y(form).mul_(2.0)
    if context is nullcontext:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        truth, leaves = problem.truth()
        probe = randn(2, 3, 7, seed=9)
        assert_equal_gradients(problem.gradients(y, probe), gradients(2 * truth, leaves, probe), FLOOR[FP64])
