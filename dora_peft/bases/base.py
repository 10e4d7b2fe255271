"""The seam to the frozen weight W0: dense, transposed, grouped, quantised or opaque, all look like a [out, in] matrix.

DoRA needs W0 for four things only, and a new kind of base layer has to provide no more than these:

    row_norms_squared()   ||W0||^2 per output row      [out]
    times(A)              W0 A^T                       [out, r]
    vjp(g)                g^T W0                       [r, in]      (only for detach_norm=False)
    rows(index)           dense rows of W0             [k, in]      (cancelling rows, merging)

Rows are read in blocks, so that no temporary of size [out, in] exists, and accumulated in fp32 (fp64 for an fp64 base).
A convolution's kernel is flattened: in = in_channels * prod(kernel_size). An embedding's rows are its dimensions.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .inspection import FLOATS, compute_dtype, linear_map
from .offload import at_hand, execution_device, is_away

# One dense block in the accumulation dtype. Four may be alive together (rows, product, sum, square): below 64 MiB in
# all.
BLOCK_BYTES = 12 * 2**20


class BaseWeight:
    """W0 as [out, in] rows; subclasses provide `block`."""

    has_rows = True  # whether `rows` is available
    mergeable = True  # whether `replacement` can write a new weight
    has_blocks = False  # whether `block` gives rows that are next to each other in memory, at little cost

    def __init__(self, out_features: int, in_features: int, acc_dtype: torch.dtype, device: torch.device) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.dtype, self.device = acc_dtype, device
        # rows in a dense temporary, and rows in a block; the latter may be more where a block is a view
        self.dense_rows = self.block_rows = max(1, BLOCK_BYTES // (in_features * acc_dtype.itemsize))

    def block(self, start: int, stop: int) -> Tensor:
        """Rows start:stop, [stop - start, in], in the accumulation dtype; may alias the weight, so read only."""
        raise NotImplementedError

    def stored(self) -> Any:
        """What norm_kernels.py reads W0 from: a matrix [out, in], its 4-bit form, or None where it cannot."""
        return None

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        for start in range(0, self.out_features, self.block_rows):
            stop = min(start + self.block_rows, self.out_features)
            yield start, stop, self.block(start, stop)

    def rows(self, index: Tensor) -> Tensor:
        """The rows of `index` [k], densely: [k, in]."""
        out = torch.empty(len(index), self.in_features, dtype=self.dtype, device=self.device)
        for position, i in enumerate(index.tolist()):
            out[position] = self.block(i, i + 1)[0]
        return out

    def dense(self) -> Tensor:
        """W0 itself, [out, in]; for the reference implementation only."""
        return torch.cat([rows for _, _, rows in self.blocks()])

    def row_norms_squared(self) -> Tensor:
        out = torch.empty(self.out_features, dtype=self.dtype, device=self.device)
        for start, stop, rows in self.blocks():
            torch.linalg.vector_norm(rows, dim=1, out=out[start:stop])
        return out.square_()

    def times(self, lora_A: Tensor) -> Tensor:
        """W0 A^T, [out, r], for A [r, in]."""
        if self.block_rows >= self.out_features:
            return self.block(0, self.out_features) @ lora_A.T
        out = torch.empty(self.out_features, lora_A.shape[0], dtype=self.dtype, device=self.device)
        for start, stop, rows in self.blocks():
            torch.mm(rows, lora_A.T, out=out[start:stop])
        return out

    def vjp(self, grad: Tensor) -> Tensor:
        """grad^T W0, [r, in], for grad [out, r]."""
        out = torch.zeros(grad.shape[1], self.in_features, dtype=self.dtype, device=self.device)
        for start, stop, rows in self.blocks():
            out.addmm_(grad[start:stop].T, rows)
        return out

    def replacement(self, rows: Callable[[Tensor, int, int], Tensor]) -> Any:
        """A new weight parameter whose rows start:stop are `rows(block, start, stop)`, of the base's own kind."""
        raise NotImplementedError

    def keep_original(self, layer: nn.Module, offload: bool) -> nn.Parameter:
        """The weight parameter of `layer`, in a state from which `restore` brings it back bit for bit.

        Args:
            layer: The base layer.
            offload: Keep it on the CPU if it is dense; a quantised one stays where it is.
        """
        return layer.get_parameter("weight")

    def install(self, layer: nn.Module, weight: nn.Parameter) -> None:
        """Have `layer` compute with `weight`, a parameter of the kind that `replacement` gives."""
        layer.weight = weight

    def restore(self, layer: nn.Module, original: nn.Parameter) -> None:
        """Put the parameter that `keep_original` gave in the place of the installed one."""
        self.install(layer, original)


class Dense(BaseWeight):
    """A float tensor seen through `view`, which gives its [out, in] matrix without copying."""

    def __init__(self, weight: Tensor, view: Callable[[Tensor], Tensor]) -> None:
        self.weight, self.view = weight.detach(), view
        self.matrix = view(self.weight)
        acc_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        out_features, in_features = self.matrix.shape
        super().__init__(out_features, in_features, acc_dtype, weight.device)
        self.has_blocks = self.matrix.is_contiguous()
        if weight.dtype == acc_dtype:
            self.block_rows = max(1, self.out_features)

    def stored(self) -> Any:
        return self.matrix

    def block(self, start: int, stop: int) -> Tensor:
        return self.matrix[start:stop].to(self.dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self.matrix[index].to(self.dtype)

    def replacement(self, rows: Callable[[Tensor, int, int], Tensor]) -> nn.Parameter:
        new = torch.empty_like(self.weight)
        for start in range(0, self.out_features, self.dense_rows):
            stop = min(start + self.dense_rows, self.out_features)
            part = rows(self.block(start, stop), start, stop).to(new.dtype)
            if new.dim() > 2:  # flattening a channels_last kernel would copy it
                new[start:stop] = part.view(new[start:stop].shape)
            else:
                self.view(new)[start:stop] = part
        return nn.Parameter(new, requires_grad=False)

    def keep_original(self, layer: nn.Module, offload: bool) -> nn.Parameter:
        original = layer.get_parameter("weight")
        if offload:
            original.data = original.data.cpu()
        return original

    def restore(self, layer: nn.Module, original: nn.Parameter) -> None:
        # the model may have been moved or cast in between, which reached the installed weight alone
        installed = layer.get_parameter("weight")
        original.data = original.data.to(device=installed.device, dtype=installed.dtype)
        self.install(layer, original)


class GroupedConv(Dense):
    """A grouped convolution: row o reads the channels of its own group only, while A crosses all groups.

    The composed kernel is [out, in_channels, *kernel], block-diagonal in W0; `in` here is that of the composed kernel.
    """

    mergeable = False  # the composed kernel is not a grouped one

    def __init__(self, weight: Tensor, groups: int) -> None:
        super().__init__(weight, lambda w: w.flatten(1))
        self.groups, self.has_blocks = groups, False
        self.in_features *= groups
        self.dense_rows = max(1, self.dense_rows // groups)

    def stored(self) -> Any:
        return None

    def dense(self) -> Tensor:
        return self.rows(torch.arange(self.out_features, device=self.device))

    def _per_group(self, tensor: Tensor) -> Tensor:
        """[out, k] -> [groups, out / groups, k]."""
        return tensor.unflatten(0, (self.groups, -1))

    def rows(self, index: Tensor) -> Tensor:
        dense = torch.zeros(len(index), self.groups, self.matrix.shape[1], dtype=self.dtype, device=self.device)
        group = index // (self.out_features // self.groups)
        dense[torch.arange(len(index), device=index.device), group] = super().rows(index)
        return dense.flatten(1)

    def times(self, lora_A: Tensor) -> Tensor:
        A = lora_A.unflatten(1, (self.groups, -1)).transpose(0, 1)  # [groups, r, in / groups]
        return torch.bmm(self._per_group(self.matrix.to(self.dtype)), A.transpose(1, 2)).flatten(0, 1)

    def vjp(self, grad: Tensor) -> Tensor:
        per_group = torch.bmm(self._per_group(grad).transpose(1, 2), self._per_group(self.matrix.to(self.dtype)))
        return per_group.transpose(0, 1).flatten(1)  # [r, groups, in / groups] -> [r, in]


class Bnb8bit(BaseWeight):
    """bitsandbytes int8: a row is CB[row] * SCB[row] / 127."""

    def __init__(self, layer: Any, weight: Any) -> None:
        self.layer = layer
        self.data = weight.data
        # the first forward moves SCB from the parameter to the layer's state
        scb = weight.SCB if weight.SCB is not None else layer.state.SCB
        self.row_scale = scb.to(torch.float32) / 127
        out_features, in_features = weight.shape
        super().__init__(out_features, in_features, torch.float32, weight.device)

    def block(self, start: int, stop: int) -> Tensor:
        return self.data[start:stop].to(self.dtype) * self.row_scale[start:stop, None].to(self.device)

    def replacement(self, rows: Callable[[Tensor, int, int], Tensor]) -> Any:
        dense = torch.cat([rows(block, start, stop).half().cpu() for start, stop, block in self.blocks()])
        new = type(self.layer.weight)(dense, requires_grad=False, has_fp16_weights=self.layer.state.has_fp16_weights)
        return new.to(self.device)

    def keep_original(self, layer: Any, offload: bool) -> Any:
        original = layer.weight
        # the first forward has moved both to the layer's state, where those of the merged weight will be
        original.CB, original.SCB = original.data, layer.state.SCB if original.SCB is None else original.SCB
        return original

    def install(self, layer: Any, weight: Any) -> None:
        layer.weight = weight
        # the next forward takes both from the parameter
        layer.state.CB = layer.state.SCB = None


class FourBit(NamedTuple):
    """A 4-bit weight as it is stored: element i is code[nibble i] * absmax[i // blocksize], rounded to `dtype`."""

    packed: Tensor  # uint8 [out in / 2], the even elements in the upper halves
    absmax: Tensor  # fp32 [out in / blocksize]
    code: Tensor  # fp32 [16]
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Bnb4bit(BaseWeight):
    """bitsandbytes nf4 or fp4. Quantisation blocks run along the flattened weight, so a block of rows is dequantised
    alone where rows end on block borders; elsewhere the weight is dequantised as a whole."""

    def __init__(self, layer: Any, weight: Any) -> None:
        self.layer, self.weight = layer, weight
        self.data, self.state = _unpacked(weight)
        out_features, in_features = self.state.shape
        super().__init__(out_features, in_features, torch.float32, weight.device)
        # the least number of rows that fills whole quantisation blocks
        self.align = self.state.blocksize // math.gcd(self.state.blocksize, self.in_features)
        self.block_rows = max(self.align, self.block_rows // self.align * self.align)
        self._absmax: Tensor | None = None

    def block(self, start: int, stop: int) -> Tensor:
        first = start // self.align * self.align
        last = min(-(-stop // self.align) * self.align, self.out_features)
        return self._dequantize(first, last)[start - first : stop - first]

    def stored(self) -> Any:
        state = self.state
        packed = self.data.view(torch.uint8).flatten()
        return FourBit(packed, self._statistics().float(), state.code, state.blocksize, state.dtype, tuple(state.shape))

    def _statistics(self) -> Tensor:
        """The largest absolute value of each quantisation block."""
        import bitsandbytes.functional as bnb

        if self._absmax is None:
            self._absmax = self.state.absmax
            if self.state.nested:
                self._absmax = bnb.dequantize_blockwise(self.state.absmax, self.state.state2) + self.state.offset
        return self._absmax

    def _dequantize(self, start: int, stop: int) -> Tensor:
        import bitsandbytes.functional as bnb

        state, n = self.state, self.in_features
        packed = self.data.view(torch.uint8).flatten()[start * n // 2 : -(-stop * n // 2)]
        part = bnb.QuantState(
            absmax=self._statistics()[start * n // state.blocksize : -(-stop * n // state.blocksize)].float(),
            shape=torch.Size((stop - start, n)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        return bnb.dequantize_4bit(packed[:, None], part).to(self.dtype)

    def replacement(self, rows: Callable[[Tensor, int, int], Tensor]) -> Any:
        parts = [rows(block, start, stop).to(self.state.dtype).cpu() for start, stop, block in self.blocks()]
        weight = self.weight
        new = type(weight)(
            torch.cat(parts),
            requires_grad=False,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
            module=self.layer,
        )
        return new.to(self.device)


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """Data and quantisation state of a 4-bit weight in row order.

    An evaluation on a CPU with AVX512-BF16 repacks both in place (bitsandbytes >= 0.49), with fp32 statistics as bf16.
    """
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return weight.data, weight.quant_state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(weight.quant_state)  # the inverse writes into it, and leaves the statistics transposed
    absmax = state.absmax.T.reshape(-1).float()
    data, _ = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax, state.nested = absmax, False
    return data, state


def unpack_for_gradient(layer: Any, x: Tensor, training: bool) -> None:
    """Undo bitsandbytes' repacking for evaluation before a call that needs a gradient.

    Its product of a packed weight has none for x, and says so only where the layer has a bias. Evaluation mode alone
    does not mean that none is asked for.
    """
    if not training and not (x.requires_grad and torch.is_grad_enabled()):
        return
    weight: Any = getattr(layer, "weight", None)
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        weight.data, weight.quant_state = _unpacked(weight)


class Dequantized(Dense):
    """A base whose library can only dequantise the whole weight (HQQ, torchao): one dense layer, transient."""

    mergeable = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(dequantize_module_weight(layer), lambda w: w)


class Opaque(BaseWeight):
    """A base that is only a linear map: called without its bias, or less that, it gives A W0^T for A, and its columns
    for blocks of unit vectors.

    It is called in the dtype that it computes in, see `compute_dtype`.
    """

    has_rows = False
    mergeable = False

    def __init__(self, layer: nn.Module, out_features: int, in_features: int) -> None:
        self.layer = layer
        self.compute_dtype = compute_dtype(layer, in_features)
        tensors = [*layer.parameters(), *layer.buffers()]
        super().__init__(out_features, in_features, torch.float32, tensors[0].device)

    def _apply(self, x: Tensor) -> Tensor:
        x = x.to(self.compute_dtype)
        module, bias = linear_map(self.layer, x)
        y = module(x).to(self.dtype)
        return y if bias is None else y - bias.to(self.dtype)

    def _columns(self) -> Iterator[tuple[int, int, Tensor]]:
        """Columns start:stop of W0, transposed: [stop - start, out]."""
        step = max(1, BLOCK_BYTES // (max(self.out_features, self.in_features) * 4))
        for start in range(0, self.in_features, step):
            stop = min(start + step, self.in_features)
            unit = torch.zeros(stop - start, self.in_features, device=self.device)
            unit[:, start:stop].fill_diagonal_(1)
            yield start, stop, self._apply(unit)

    def row_norms_squared(self) -> Tensor:
        out = torch.zeros(self.out_features, dtype=self.dtype, device=self.device)
        for _, _, columns in self._columns():
            out += columns.square_().sum(0)
        return out

    def times(self, lora_A: Tensor) -> Tensor:
        return self._apply(lora_A).T

    def vjp(self, grad: Tensor) -> Tensor:
        return torch.cat([columns @ grad for _, _, columns in self._columns()]).T


class Offloaded(BaseWeight):
    """A weight that accelerate keeps elsewhere: each method brings it in, and lets it go again.

    Args:
        layer: The base layer, see `offload.is_away`.
        look: Gives the seam for it while its weight is here.
    """

    def __init__(self, layer: Any, look: Callable[[], BaseWeight]) -> None:
        self.layer, self.look = layer, look
        # a dense weight has its shape and dtype on the meta device too
        dense = isinstance(getattr(layer, "weight", None), Tensor) and layer.weight.dtype in FLOATS
        with contextlib.nullcontext() if dense else at_hand(layer):
            seen = look()
        super().__init__(seen.out_features, seen.in_features, seen.dtype, execution_device(layer))
        self.has_rows, self.mergeable, self.dense_rows = seen.has_rows, seen.mergeable, seen.dense_rows

    def block(self, start: int, stop: int) -> Tensor:
        with at_hand(self.layer):
            return self.look().block(start, stop)

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        with at_hand(self.layer):
            yield from self.look().blocks()

    def rows(self, index: Tensor) -> Tensor:
        with at_hand(self.layer):
            return self.look().rows(index)

    def dense(self) -> Tensor:
        with at_hand(self.layer):
            return self.look().dense()

    def row_norms_squared(self) -> Tensor:
        with at_hand(self.layer):
            return self.look().row_norms_squared()

    def times(self, lora_A: Tensor) -> Tensor:
        with at_hand(self.layer):
            return self.look().times(lora_A)

    def vjp(self, grad: Tensor) -> Tensor:
        with at_hand(self.layer):
            return self.look().vjp(grad)

    def replacement(self, rows: Callable[[Tensor, int, int], Tensor]) -> Any:
        with at_hand(self.layer):
            return self.look().replacement(rows)


def base_weight(layer: Any, name: str, weight: Any = None) -> BaseWeight:
    """The seam for a base layer.

    Args:
        layer: The wrapped base layer.
        name: Its module name, for errors.
        weight: Stands in for `layer.weight`: the original one while adapters are merged.

    Raises:
        ValueError: The layer's weight has a dtype that is neither floating point nor a known quantisation.
    """
    if weight is None and is_away(layer):
        return Offloaded(layer, lambda: _seam(layer, name, None))
    return _seam(layer, name, weight)


def _seam(layer: Any, name: str, weight: Any) -> BaseWeight:
    weight = getattr(layer, "weight", None) if weight is None else weight
    kind = type(weight).__name__
    if kind == "Params4bit" and weight.quant_state is not None:
        return Bnb4bit(layer, weight)
    if kind == "Int8Params" and weight.dtype == torch.int8:
        return Bnb8bit(layer, weight)
    packed = hasattr(layer, "W_q") or type(weight).__module__.startswith("torchao.")
    if packed:
        try:
            return Dequantized(layer)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # torchao's NF4Tensor has a `dequantize` that takes other arguments; its forward works
            pass
    if isinstance(weight, Tensor) and weight.dtype in FLOATS and not packed and not hasattr(layer, "qweight"):
        if isinstance(layer, (Conv1D, nn.Embedding)):
            return Dense(weight, Tensor.t)
        if getattr(layer, "groups", 1) > 1:
            return GroupedConv(weight, layer.groups)
        return Dense(weight, lambda w: w.flatten(1))
    known = isinstance(weight, Tensor) and isinstance(layer, (nn.Linear, nn.Embedding, Conv1D)) and kind == "Parameter"
    if known and weight.dtype not in FLOATS:  # with a float one it quantises at each call, as quanto before `freeze`
        raise ValueError(
            f"DoRA cannot adapt module '{name}' ({type(layer).__name__}): expected a weight of dtype float32, "
            f"bfloat16, float16 or float64, or one quantised by bitsandbytes, found {weight.dtype}. Convert the base "
            f"model, or leave the module out with exclude_modules=['{name.rpartition('.')[2]}']."
        )
    out_features, in_features = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if out_features is None or in_features is None:
        raise ValueError(
            f"DoRA cannot adapt module '{name}': {type(layer).__name__} has neither a float weight nor in_features and "
            "out_features. Leave it out with exclude_modules."
        )
    return Opaque(layer, out_features, in_features)
