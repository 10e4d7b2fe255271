"""Whether a tensor still holds what it held, decided by its bits.

Identity, address and version counter do not show it: averaging helpers, trainers and optimizers write through `.data`,
raw pointers and copies, and a freed address is used again. So the small factors are compared with a copy, bit for bit,
and the large frozen weight by a sample of its elements; another tensor with the same sample is compared by a digest of
all its bits.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..bases import scratch

# Elements of a frozen weight that are compared at every forward pass, evenly spaced from a fixed odd place on; a weight
# of at most WHOLE elements is compared in full.
SAMPLE, WHOLE = 64, 4096
# Words of a weight that the digest weights differently, and words that it takes at once: temporaries that stay in
# the cache.
_ROW, _BLOCK = 2**10, 2**16
_MASK = 2**64 - 1
_PLAIN = (Tensor, nn.Parameter)
# A base weight as stored: a tensor, packed if quantised, or a module that keeps it in parts.
Weight = Tensor | nn.Module


def _find_memcmp() -> Callable[[int, int, int], int] | None:
    """C's memcmp: 1.1 us for two tensors of 32 KiB, where torch.equal takes 6."""
    try:
        # PyDLL: to let go of Python's lock would take longer than to compare
        function = ctypes.PyDLL("msvcrt" if sys.platform == "win32" else None).memcmp
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return function


MEMCMP = _find_memcmp()


class Bits:
    """A copy of a tensor's content, outside of every graph, to compare with later.

    Attributes:
        copy: The contiguous copy.
    """

    __slots__ = ("by_address", "copy", "dtype", "pointer", "shape", "size")

    def __init__(self, tensor: Tensor) -> None:
        self.copy = copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.shape, self.dtype = copy.shape, copy.dtype
        self.by_address = MEMCMP is not None and copy.is_cpu and type(copy) in _PLAIN
        self.pointer, self.size = (copy.data_ptr(), copy.nbytes) if self.by_address else (0, 0)

    def fits(self, tensor: Tensor) -> bool:
        """Whether `tensor` holds the same bits. Waits for the device if that is no CPU."""
        if (
            self.by_address
            and MEMCMP is not None
            and tensor.is_cpu
            and type(tensor) in _PLAIN
            and tensor.is_contiguous()
        ):
            return (
                tensor.dtype is self.dtype
                and tensor.shape == self.shape
                and not MEMCMP(tensor.data_ptr(), self.pointer, self.size)
            )
        copy = self.copy
        if tensor.dtype is not self.dtype or tensor.shape != self.shape or tensor.device != copy.device:
            return False
        with torch.no_grad():
            return torch.equal(_integers(tensor.detach()), _integers(copy))


def same_bits(tensor: Tensor, copy: Tensor) -> bool:
    """Whether `tensor` holds the bits of `copy`, a contiguous tensor. Waits for the device if that is no CPU."""
    if tensor.dtype is not copy.dtype or tensor.shape != copy.shape or tensor.device != copy.device:
        return False
    if MEMCMP is not None and tensor.is_cpu and type(tensor) in _PLAIN and tensor.is_contiguous():
        return not MEMCMP(tensor.data_ptr(), copy.data_ptr(), copy.nbytes)
    with torch.no_grad():
        return torch.equal(_integers(tensor.detach()), _integers(copy))


def _integers(tensor: Tensor) -> Tensor:
    """The bits of each element: equal for equal NaN, different for 0 and -0."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.dtype.itemsize]) if tensor.dtype.itemsize in kinds else torch.view_as_real(tensor)


class Fingerprint:
    """What a frozen weight was when its norm was computed.

    For the same tensor its version counter and the sample have to be unchanged; for another one, or at another address,
    as sharding and offloading give at every forward pass, the sample, and for another tensor the digest.

    Args:
        weight: The weight as stored: any dtype, packed as well. A tensor without storage, or a module that
            keeps its weight in parts, is known by identity and version alone.
    """

    def __init__(self, weight: Weight) -> None:
        self.same = _reference(weight)
        self.version = version(weight)
        self.sample, self.digest, self.whole = _sample(weight), 0, False
        if self.sample is not None and isinstance(weight, Tensor):
            self.digest, self.whole = digest(_plain(weight)), self.sample.numel() == weight.numel()
        # of the elements of `sample` in the weight itself, at `address`
        self.view: Tensor | None = None
        self.address = 0

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("A fingerprint belongs to one tensor and cannot be copied.")

    def fits(self, weight: Weight) -> bool:
        """Whether `weight` is what this was made from, as far as the sample sees. One that is elsewhere (meta) is."""
        if not isinstance(weight, Tensor):
            return self.same() is weight
        if self.same() is weight:
            if self.version is None or self.sample is None:
                return version(weight) == self.version and (self.sample is None or self._same_sample(weight))
            if weight._version != self.version:
                return False
            if self.view is None or weight.data_ptr() != self.address:
                return self._look_at(weight)
            if self.whole and MEMCMP is not None:
                return not MEMCMP(self.address, self.sample.data_ptr(), self.sample.nbytes)
            return torch.equal(self.view, self.sample)
        if weight.is_meta:
            # offloaded: its hook brings the same content in
            return True
        return self.sample is not None and self._same_sample(weight) and self._adopt(weight)

    def _look_at(self, weight: Tensor) -> bool:
        """As `_same_sample`, and from now on through a view."""
        if weight.is_meta:
            return True
        if not self._same_sample(weight):
            return False
        if weight.is_cpu and type(weight) in _PLAIN and weight.is_contiguous():
            self.view, self.address = _elements(weight), weight.data_ptr()
        return True

    def let_go(self) -> None:
        """Of the weight's memory: it is about to be moved or freed."""
        self.view = None

    def _same_sample(self, weight: Weight) -> bool:
        found, sample = _sample(weight), self.sample
        if found is None or sample is None or found.dtype is not sample.dtype or found.device != sample.device:
            return False
        return torch.equal(found, sample)

    def _adopt(self, weight: Tensor) -> bool:
        """Whether another tensor has the same content; it is the one to be compared with from now on."""
        if self.digest != digest(_plain(weight)):
            return False
        self.same, self.version = _reference(weight), version(weight)
        return True


def _reference(weight: Weight) -> Callable[[], object]:
    """Does not keep the weight alive: an offloaded one goes after its forward pass."""
    try:
        return weakref.ref(weight)
    except TypeError:
        return lambda: None


def version(weight: object) -> int | None:
    """The version counter, None for what has none."""
    return None if not isinstance(weight, Tensor) or weight.is_inference() else weight._version


def _plain(weight: Tensor) -> Tensor:
    """The tensor itself, of a parameter class such as bitsandbytes' as well."""
    return weight.detach() if type(weight) in _PLAIN else weight.as_subclass(Tensor).detach()


def _sample(weight: Weight) -> Tensor | None:
    """A copy of some elements of `weight`; None if it has no storage."""
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.numel():
        return None
    if type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None
    return _elements(_plain(weight)).clone()


def _elements(weight: Tensor) -> Tensor:
    step = _step(weight)
    if step > 1 and not weight.is_contiguous():
        # `reshape` would copy all of a kernel in channels_last
        index = torch.arange(_start(step), weight.numel(), step, device=weight.device)[:SAMPLE]
        return weight.detach()[torch.unravel_index(index, weight.shape)]
    return weight.detach().reshape(-1)[_start(step) :: step][: SAMPLE if step > 1 else WHOLE]


def _step(weight: Tensor) -> int:
    return 1 if weight.numel() <= WHOLE else weight.numel() // SAMPLE


def _start(step: int) -> int:
    """An odd place in each stretch of `step` elements: not the first columns of a matrix alone."""
    return 0 if step < 2 else (step // 3) | 1


def digest(tensor: Tensor) -> int:
    """64 bits that differ with the content of `tensor`: other values, other signs, other places of the same values.

    Each word of 64 bits is mixed before it is weighted: with plain or odd-weighted sums alone two changes of the
    highest bit would cancel modulo 2^64. The shift is an arithmetic one: a flipped sign reaches every lower bit.
    """
    if not tensor.is_contiguous():
        with scratch.lent(tensor.numel(), tensor.dtype, tensor.device) as memory:
            return digest(memory.view(tensor.shape).copy_(tensor.detach()))
    with torch.no_grad():
        words = _words(tensor.detach())
        weights, parts = _weights(tensor.device), []
        with scratch.lent(2 * min(_BLOCK, words.numel()), torch.int64, tensor.device) as memory:
            for start in range(0, words.numel(), _BLOCK):
                parts += _sums(words[start : start + _BLOCK], weights, memory)
        total = words.numel()
        # read at once: a device is waited for only here
        for part in torch.cat(parts).tolist() if parts else []:
            total = ((total ^ part) * 0x9E3779B97F4A7C15 + 1) & _MASK
            total ^= total >> 31
    return total


def _sums(block: Tensor, weights: Tensor, memory: Tensor) -> list[Tensor]:
    """The weighted sums of some mixed words [n], for memory of twice as many."""
    mixed = torch.bitwise_right_shift(block, 32, out=memory[: len(block)])
    mixed.bitwise_xor_(block).mul_(-7046029254386353131)
    mixed.bitwise_xor_(torch.bitwise_right_shift(mixed, 29, out=memory[len(block) : 2 * len(block)]))
    whole = len(mixed) // _ROW * _ROW
    sums = [mixed[:whole].view(-1, _ROW).mul_(weights).sum(1)] if whole else []
    if whole < len(mixed):
        sums.append(mixed[whole:].mul_(weights[: len(mixed) - whole]).sum(0, keepdim=True))
    return sums


def _words(tensor: Tensor) -> Tensor:
    """The bytes of `tensor` as int64 [words], filled up with zeros."""
    flat = tensor.contiguous().view(-1) if tensor.dim() else tensor.reshape(1)
    data = flat.view(torch.uint8)
    if data.numel() % 8:
        data = torch.cat([data, data.new_zeros(8 - data.numel() % 8)])
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """Odd random numbers [_ROW], the same in every process."""
    generator = torch.Generator().manual_seed(2402)
    return torch.randint(-(2**63), 2**63 - 1, (_ROW,), generator=generator).bitwise_or_(1).to(device)
