"""Memory in which what a kernel leaves out, and what it writes or reads beyond its tensors, shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

# Bytes before and behind each tensor: more than a block of rows, and a multiple of the alignment that torch gives, so
# that kernels are compiled as for any other tensor.
GUARD = 2**16
# Of every byte that nothing has been written to: NaN in each floating dtype, -1 in each of whole numbers.
POISON = 255
_EMPTY: set[object] = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty}
_ZERO: set[object] = {torch.zeros, torch.zeros_like, Tensor.new_zeros}


class Guarded(TorchFunctionMode):
    """In its `with` block, what torch allocates is poisoned, unless it is to be 0, and lies between guards."""

    def __init__(self) -> None:
        super().__init__()
        # a tensor with the bytes around it, each with what it is called
        self._buffers: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., T],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> T | Tensor:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (func in _EMPTY or func in _ZERO):
            return self.place(result, empty=func in _EMPTY)
        return result

    def place(self, tensor: Tensor, *, empty: bool = False) -> Tensor:
        """The same tensor between guards, in the same layout; poisoned if `empty`."""
        size = tensor.numel() * tensor.element_size()
        dense = tensor.is_contiguous() or (tensor.dim() == 2 and tensor.T.is_contiguous())
        # in the interpreter Triton makes tensors of no elements, and gives them a storage later
        if not size or not dense:
            return tensor
        with torch._C.DisableTorchFunction():
            buffer = torch.full((size + 2 * GUARD,), POISON, dtype=torch.uint8, device=tensor.device)
            self._buffers.append(buffer)
            inside = buffer[GUARD : GUARD + size].view(tensor.dtype).as_strided(
                tensor.shape, tensor.stride(), GUARD // tensor.element_size()
            )  # fmt: skip
            return inside if empty else inside.copy_(tensor)

    def overrun(self) -> bool:
        """Whether something was written to a guard since the last call."""
        buffers, self._buffers = self._buffers, []
        with torch._C.DisableTorchFunction():
            return any(bool((part != POISON).any()) for b in buffers for part in (b[:GUARD], b[-GUARD:]))
