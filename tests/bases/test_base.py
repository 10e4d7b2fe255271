"""Every kind of base layer behaves as its dense [out, in] matrix."""

import math
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig, DoraLayer
from dora_peft.bases import base as base_weight_module
from dora_peft.bases.base import base_weight
from dora_peft.ops import functional

bnb = pytest.importorskip("bitsandbytes")
MIB = 2**20


# ---- layers and what their matrix is


def randomised(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.requires_grad_(False)


def conv_matrix(layer):
    """The kernel over all input channels, zero outside a row's own group: [out, in_channels * prod(kernel)]."""
    out, per_group = layer.weight.shape[:2]
    dense = torch.zeros(out, layer.in_channels, *layer.weight.shape[2:], dtype=torch.float64)
    for j in range(out):
        first = j // (out // layer.groups) * per_group
        dense[j, first : first + per_group] = layer.weight[j].double()
    return dense.flatten(1)


def four_bit(width, out, quant_type, nested, **options):
    layer = bnb.nn.Linear4bit(width, out, quant_type=quant_type, compress_statistics=nested, **options)
    layer.load_state_dict(randomised(nn.Linear(width, out, bias=options.get("bias", True))).state_dict())
    return layer.to("cpu")


def eight_bit(width, out):
    layer = bnb.nn.Linear8bitLt(width, out, has_fp16_weights=False)
    layer.load_state_dict(randomised(nn.Linear(width, out)).state_dict())
    return layer.to("cpu")


def four_bit_matrix(layer):
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()


def eight_bit_matrix(layer):
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.double() * scale.double()[:, None] / 127


class MapsOnly(nn.Module):
    """A linear map whose weight cannot be read, like a layer of a library with its own packed format."""

    def __init__(self, width, out, bias=True, dtype=torch.float32):
        super().__init__()
        self.in_features, self.out_features = width, out
        self.qweight = nn.Parameter(torch.randint(-100, 100, (out, width), dtype=torch.int8), requires_grad=False)
        self.register_buffer("scales", torch.rand(out).to(dtype))
        self.bias = nn.Parameter(torch.randn(out).to(dtype), requires_grad=False) if bias else None

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales[:, None], self.bias)


def linear_matrix(layer):
    return layer.weight.double()


def transposed_matrix(layer):
    return layer.weight.double().T


DENSE = {
    "linear": (lambda: nn.Linear(11, 7), linear_matrix),
    "linear-fp64": (lambda: nn.Linear(11, 7, dtype=torch.float64), linear_matrix),
    "linear-bf16": (lambda: nn.Linear(11, 7).bfloat16(), linear_matrix),
    "linear-fp16": (lambda: nn.Linear(11, 7).half(), linear_matrix),
    "linear-1x1": (lambda: nn.Linear(1, 1), linear_matrix),
    "conv1D": (lambda: Conv1D(7, 11), transposed_matrix),
    "conv1D-bf16": (lambda: Conv1D(7, 11).bfloat16(), transposed_matrix),
    "embedding": (lambda: nn.Embedding(23, 5), transposed_matrix),
    "embedding-bf16": (lambda: nn.Embedding(23, 5).bfloat16(), transposed_matrix),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), conv_matrix),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2)), conv_matrix),
    "conv2d-bf16": (lambda: nn.Conv2d(4, 6, 3).bfloat16(), conv_matrix),
    "conv2d-pointwise": (lambda: nn.Conv2d(4, 6, 1), conv_matrix),
    "conv2d-channels_last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), conv_matrix),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), conv_matrix),
}
GROUPED = {
    "conv1d-grouped": (lambda: nn.Conv1d(6, 4, 3, groups=2), conv_matrix),
    "conv2d-grouped": (lambda: nn.Conv2d(6, 9, (3, 2), groups=3), conv_matrix),
    "conv2d-grouped-bf16": (lambda: nn.Conv2d(6, 9, 2, groups=3).bfloat16(), conv_matrix),
    "conv2d-depthwise": (lambda: nn.Conv2d(5, 10, 3, groups=5), conv_matrix),
    "conv3d-grouped": (lambda: nn.Conv3d(4, 4, 2, groups=2), conv_matrix),
}
QUANTISED = {
    "int8": (lambda: eight_bit(40, 24), eight_bit_matrix),
    **{
        f"{kind}{'-nested' * nested}-{width}x{out}": (
            lambda kind=kind, nested=nested, width=width, out=out: four_bit(width, out, kind, nested),
            four_bit_matrix,
        )
        for kind in ("nf4", "fp4")
        for nested in (False, True)
        # whole quantisation blocks per row; blocks across rows; a last block that is not full; an odd number of values
        for width, out in ((128, 32), (40, 24), (200, 7), (13, 5))
    },
    "nf4-blocksize128": (lambda: four_bit(96, 20, "nf4", False, blocksize=128), four_bit_matrix),
    "nf4-bf16-storage": (
        lambda: four_bit(64, 32, "nf4", True, quant_storage=torch.bfloat16, compute_dtype=torch.bfloat16),
        four_bit_matrix,
    ),
}
if "blocksize" not in bnb.nn.Linear4bit.__init__.__code__.co_varnames:
    del QUANTISED["nf4-blocksize128"]
OPAQUE = {
    "opaque": (lambda: MapsOnly(11, 7), lambda layer: layer.qweight.double() * layer.scales.double()[:, None]),
    "opaque-no-bias": (
        lambda: MapsOnly(11, 7, bias=False),
        lambda layer: layer.qweight.double() * layer.scales.double()[:, None],
    ),
}
WITH_ROWS = {**DENSE, **GROUPED, **QUANTISED}
ALL = {**WITH_ROWS, **OPAQUE}


def build(kind):
    torch.manual_seed(0)
    make, matrix = ALL[kind]
    layer = make()
    if kind in DENSE or kind in GROUPED:
        randomised(layer)
    return layer, matrix(layer)


@pytest.fixture(params=["one block", "small blocks"])
def block_bytes(request, monkeypatch):
    """The real block size, where these layers fit into one block, and one that holds two or three of their rows."""
    if request.param == "small blocks":
        monkeypatch.setattr(base_weight_module, "BLOCK_BYTES", 150)


def close(found, expected):
    """Against sums in float64, with the accumulation dtype's own rounding."""
    assert found.dtype in (torch.float32, torch.float64)
    rtol, atol = (1e-12, 1e-12) if found.dtype == torch.float64 else (1e-5, 1e-5 * expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


# ---- the methods


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
    blocks = list(weight.blocks())
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
    functional.norm_squared(weight, weight.row_norms_squared(), A, torch.randn(weight.out_features, 2).to(A), 1.0)
    weight.vjp(torch.randn(weight.out_features, 2, dtype=weight.dtype))
    after = layer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["opaque", "opaque-no-bias"])
def test_opaque_weights_are_read_in_blocks_of_columns(kind, monkeypatch):
    monkeypatch.setattr(base_weight_module, "BLOCK_BYTES", 4 * 11 * 3)
    layer, matrix = build(kind)
    calls = []
    layer.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    weight = base_weight(layer, "layer")
    assert not weight.has_rows
    assert not weight.mergeable
    close(weight.row_norms_squared(), matrix.square().sum(1))
    assert calls == [3, 3, 3, 2]


def test_opaque_weights_of_low_precision_are_called_in_it():
    layer = MapsOnly(11, 7, dtype=torch.bfloat16)
    dtypes = set()
    layer.register_forward_hook(lambda module, args, out: dtypes.add(args[0].dtype))
    found = base_weight(layer, "layer").times(torch.eye(11))
    assert dtypes == {torch.bfloat16}
    assert found.dtype == torch.float32
    matrix = (layer.qweight.bfloat16() * layer.scales[:, None]).float()
    torch.testing.assert_close(found, matrix, rtol=2e-2, atol=2e-2 * matrix.abs().max().item())


class Computes(MapsOnly):
    """Keeps its scales in fp16 and computes in another dtype, as AWQ's layers do in a bf16 model."""

    def __init__(self, takes, computes=None):
        super().__init__(11, 7, dtype=torch.float16)
        self.takes, self.computes = takes, computes

    def forward(self, x):
        if x.dtype not in self.takes:
            raise RuntimeError(f"expected one of {self.takes}, found {x.dtype}")
        dtype = self.computes or x.dtype
        return nn.functional.linear(x.to(dtype), (self.qweight.to(dtype) * self.scales[:, None].to(dtype)))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("takes", "computes", "expected"),
    [
        ([BF16], None, BF16),
        ([FP16], None, FP16),
        ([FP16, BF16], None, BF16),
        ([FP32, FP16, BF16], None, FP32),
        ([FP32, FP16, BF16], FP16, FP16),
        ([FP32, FP16, BF16], BF16, BF16),
        ([], None, FP16),
    ],
)
def test_the_dtype_that_an_opaque_layer_computes_in(takes, computes, expected):
    layer = Computes(takes, computes)
    layer.bias = None
    assert base_weight(layer, "layer").compute_dtype == expected
    layer.dtype = FP16
    assert base_weight(layer, "layer").compute_dtype == FP16
    layer.compute_dtype = BF16
    assert base_weight(layer, "layer").compute_dtype == BF16


def test_an_opaque_layer_is_read_alike_before_and_after_it_casts_its_scales():
    """Some libraries cast them at the first call; a norm taken before has to be the one after a reload."""
    layer = Computes([FP32, FP16, BF16])
    layer.bias = None
    before = base_weight(layer, "layer").row_norms_squared()
    layer.scales = layer.scales.float()
    torch.testing.assert_close(base_weight(layer, "layer").row_norms_squared(), before, rtol=1e-6, atol=0)


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


def partitioned(layer):
    layer.weight = nn.Parameter(torch.empty(0))
    layer.weight.ds_id = 3
    return layer


def sharded(layer):
    layer.weight = nn.Parameter(layer.weight.detach())
    layer.weight.device_mesh, layer.weight.placements = "mesh", "(Shard(dim=0),)"
    return layer


@pytest.mark.parametrize(("make", "found"), [(partitioned, "ZeRO-3"), (sharded, "sharded one")])
@pytest.mark.parametrize("kind", [lambda: nn.Linear(4, 5), lambda: nn.Embedding(4, 5), lambda: nn.Conv1d(4, 5, 3)])
def test_a_part_of_a_weight_is_refused_at_creation(kind, make, found):
    model = nn.Sequential(nn.Tanh(), make(kind()))
    with pytest.raises(ValueError, match=rf"module '1'.*whole weight.*{found}.*Create the adapter before"):
        get_peft_model(model, DoraConfig(r=2, target_modules=["1"]))
    assert not isinstance(model[1], DoraLayer)


# ---- writing


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("kind", DENSE)
def test_replacement_writes_the_rows_that_it_is_given(kind):
    layer, matrix = build(kind)
    weight = base_weight(layer, "layer")
    factor = torch.arange(1.0, len(matrix) + 1, dtype=weight.dtype)[:, None]
    new = weight.replacement(lambda rows, start, stop: 2 * factor[start:stop] * rows)
    assert isinstance(new, nn.Parameter)
    assert not new.requires_grad
    assert (new.dtype, new.shape, new.stride()) == (layer.weight.dtype, layer.weight.shape, layer.weight.stride())
    assert new.data_ptr() != layer.weight.data_ptr()
    layer.weight = new
    expected = (2 * factor.double() * matrix).to(new.dtype).double()
    torch.testing.assert_close(ALL[kind][1](layer), expected, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("kind", QUANTISED)
def test_replacement_of_a_quantised_weight_is_quantised_alike(kind):
    layer, matrix = build(kind)
    old = layer.weight
    new = base_weight(layer, "layer").replacement(lambda rows, start, stop: -0.5 * rows)
    assert type(new) is type(old)
    assert (new.dtype, new.shape) == (old.dtype, old.shape)
    layer.weight = new
    found = ALL[kind][1](layer)
    if kind == "int8":
        assert (found + 0.5 * matrix).abs().max() <= 0.51 * matrix.abs().amax(1).max() / 127
    else:
        assert new.quant_state.nested == old.quant_state.nested
        assert new.quant_state.quant_type == old.quant_state.quant_type
        assert new.quant_state.blocksize == old.quant_state.blocksize
        # half the widest gap between two levels of the code, and the rounding of nested block scales
        code = old.quant_state.code.sort().values
        assert (found + 0.5 * matrix).abs().max() <= 0.6 * code.diff().max() * 0.5 * matrix.abs().max()


@pytest.mark.parametrize("kind", GROUPED)
def test_grouped_and_opaque_weights_say_that_they_cannot_be_replaced(kind):
    layer, _ = build(kind)
    assert not base_weight(layer, "layer").mergeable


# ---- bitsandbytes' own changes of format


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_weights_repacked_for_the_cpu(quant_type, nested):
    """An evaluation on a CPU with AVX512-BF16 repacks the weight in place (bitsandbytes >= 0.49)."""
    repack = getattr(bnb.functional, "_convert_weight_packed_for_cpu", None)
    if repack is None:
        pytest.skip("this bitsandbytes does not repack")
    torch.manual_seed(0)
    layer = four_bit(128, 64, quant_type, nested)
    matrix = four_bit_matrix(layer)
    layer.weight.data, layer.weight.quant_state = repack(layer.weight.data, layer.weight.quant_state)
    packed, absmax = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    for _ in range(2):
        weight = base_weight(layer, "layer")
        # bitsandbytes rounds the block scales to bf16 when it repacks
        torch.testing.assert_close(weight.rows(torch.arange(64)).double(), matrix, rtol=2**-7, atol=0)
        torch.testing.assert_close(weight.row_norms_squared().double(), matrix.square().sum(1), rtol=2**-7, atol=0)
    # what bitsandbytes multiplies with is as it was
    assert layer.weight.quant_state.packing_format_for_cpu
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(layer.weight.quant_state.absmax, absmax)
    new = weight.replacement(lambda rows, start, stop: rows)
    layer.weight = new
    torch.testing.assert_close(four_bit_matrix(layer), matrix, rtol=0.02, atol=0.02 * matrix.abs().max().item())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_after_a_forward_pass(bits):
    torch.manual_seed(0)
    layer = four_bit(128, 64, "nf4", True) if bits == 4 else eight_bit(128, 64)
    matrix = four_bit_matrix(layer) if bits == 4 else eight_bit_matrix(layer)
    x = torch.randn(2, 128)
    layer.train()(x)
    close(base_weight(layer, "layer").rows(torch.arange(64)), matrix)
    with torch.no_grad():
        before = layer.eval()(x)
        rows = base_weight(layer, "layer").rows(torch.arange(64)).double()
        torch.testing.assert_close(rows, matrix, rtol=2**-7, atol=0)
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_four_bit_layers_give_their_gradient_after_an_evaluation(bias, disabled):
    """bitsandbytes' product of a repacked weight has no gradient for x: without a bias it is left out in silence."""
    repack = getattr(bnb.functional, "_convert_weight_packed_for_cpu", None)
    if repack is None:
        pytest.skip("this bitsandbytes does not repack")
    torch.manual_seed(0)
    blocks = [four_bit(128, 128, "nf4", True, bias=bias) for _ in range(2)]
    model = get_peft_model(nn.Sequential(*blocks), DoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    model.eval()
    x = torch.randn(3, 128, requires_grad=True)

    def gradient():
        with model.disable_adapter() if disabled else nullcontext():
            return torch.autograd.grad(model(x).sum(), x)[0]

    expected = gradient()
    for block in blocks:  # what an evaluation does on a CPU with AVX512-BF16
        block.weight.data, block.weight.quant_state = repack(block.weight.data, block.weight.quant_state)
    # it also rounds the block scales to bf16
    torch.testing.assert_close(gradient(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


# ---- choice of the kind


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


def test_tensor_parallel_weights_are_refused(tmp_path):
    """As transformers' tp_plan distributes them: part of each weight is in each process."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(8, 6))
        sharded = distribute_tensor(net[0].weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        net[0].weight = nn.Parameter(sharded, requires_grad=False)
        with pytest.raises(ValueError, match=r"'0' \(Linear\).*sharded one \(DTensor \(6, 8\).*without tp_plan"):
            get_peft_model(net, DoraConfig(r=2, target_modules=["0"]))
    finally:
        distributed.destroy_process_group()


# ---- memory


class LivePeak(TorchDispatchMode):
    """The peak of the memory that operators allocated inside the mode and that is still referenced, in bytes."""

    def __init__(self, *existing):
        super().__init__()
        self.existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.existing:
                self._count(tensor)
        return out

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        users = self.live.setdefault(pointer, [size, 0])
        users[1] += 1
        weakref.finalize(tensor, self._release, pointer)
        self.peak = max(self.peak, sum(size for size, _ in self.live.values()))

    def _release(self, pointer):
        self.live[pointer][1] -= 1
        if self.live[pointer][1] == 0:
            del self.live[pointer]


@contextmanager
def transient_below(limit, *existing):
    with torch.no_grad(), LivePeak(*existing) as seen:
        yield seen
    assert 0 < seen.peak <= limit


def test_live_peak_sees_a_dense_temporary():
    weight = torch.zeros(1024, 1024)
    with pytest.raises(AssertionError), transient_below(4 * MIB - 1, weight):
        weight + 1
    with transient_below(4 * MIB, weight):
        for _ in range(3):
            weight + 1


def refresh(layer, A, B):
    weight = base_weight(layer, "layer")
    squared = weight.row_norms_squared()
    functional.norm(weight, squared, A, B, 1.0)
    functional.norm_squared(weight, squared, A, B, 1.0)
    weight.vjp(B)


def big_layers():
    """Layers of 8192 x 8192, 128 MiB in bf16; their zeros take no memory until they are read."""
    bf16, full, transposed = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), Conv1D(1, 1)
    for layer, dtype in ((bf16, torch.bfloat16), (full, torch.float32), (transposed, torch.bfloat16)):
        layer.weight = nn.Parameter(torch.zeros(8192, 8192, dtype=dtype), requires_grad=False)
    return {"bf16": bf16, "fp32": full, "Conv1D bf16": transposed}


@pytest.mark.parametrize("cancelling", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "fp32", "Conv1D bf16"])
def test_a_refresh_needs_little_memory(kind, cancelling, monkeypatch):
    if cancelling:  # no sum is accepted: every row is computed densely
        monkeypatch.setattr(functional, "CANCELLATION", math.inf)
    layer = big_layers()[kind]
    A, B = torch.ones(4, 8192), torch.ones(8192, 4)
    with transient_below(64 * MIB, layer.weight):
        refresh(layer, A, B)


def test_a_refresh_of_a_quantised_layer_needs_little_memory():
    state = bnb.functional.quantize_4bit(torch.zeros(4096, 64), quant_type="nf4")[1]
    layer = bnb.nn.Linear4bit(8192, 4096, bias=False, quant_type="nf4")
    state.shape, state.absmax = torch.Size((4096, 8192)), torch.zeros(4096 * 8192 // 64)
    packed = torch.zeros(4096 * 8192 // 2, 1, dtype=torch.uint8)
    layer.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
    A, B = torch.ones(4, 8192), torch.ones(4096, 4)
    with transient_below(64 * MIB, packed, state.absmax):
        refresh(layer, A, B)


def test_a_refresh_of_an_int8_layer_needs_little_memory():
    layer = bnb.nn.Linear8bitLt(8192, 4096, bias=False, has_fp16_weights=False)
    packed, scale = torch.zeros(4096, 8192, dtype=torch.int8), torch.zeros(4096)
    layer.weight = bnb.nn.Int8Params(packed, requires_grad=False, CB=packed, SCB=scale)
    A, B = torch.ones(4, 8192), torch.ones(4096, 4)
    with transient_below(64 * MIB, packed, scale):
        refresh(layer, A, B)
