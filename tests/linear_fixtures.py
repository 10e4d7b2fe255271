"""Problems for DoRA's linear function, and its truth from the float64 reference."""

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_peft import reference
from dora_peft.ops import choice
from dora_peft.ops import linear as subject
from dora_peft.ops.chunks import CHUNK

S = 0.7
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
FORMS = ["weight", "base_out"]
LENGTHS = [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
# what a result may be off beyond twice the eager path's own error, relative to its norm
FLOOR = {FP64: 1e-12, FP32: 1e-6, BF16: 2**-8, FP16: 2**-11}
# the largest relative error of one
ROUNDING = {FP64: 2**-53, FP32: 2**-24, BF16: 2**-8, FP16: 2**-11}


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
        # the rows that each call of base_product asked for
        self.products = []
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
    # Kernels round c * g as well.
    floor = FLOOR[dtype] * (2 if by_kernels(dtype) else 1)
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
