"""What all quantised formats share: one module's tensors in a checkpoint, and scales that take c."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor

from ...formats.adapter import UnreadableError
from ...formats.checkpoint import Checkpoint

# By checkpoint: the ends of its keys by what comes before any of their dots. One with experts has 100 000 keys.
_names: weakref.WeakKeyDictionary[Checkpoint, dict[str, list[str]]] = weakref.WeakKeyDictionary()
DEQUANTIZE = "pass --dequantize, which writes this base in floating point"


class Codes(Protocol):
    """One module's quantised weight, as it lies in a checkpoint.

    Tensors are read when they are first asked for and kept: make one per module and drop it, rather than keep many.

    Attributes:
        keys: Those of the weight in the files; what `times` gives takes the place of all of them.
        dtype: What `dequantise` gives.
    """

    keys: tuple[str, ...]
    out_features: int
    in_features: int
    dtype: torch.dtype

    def dequantise(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of W0, [stop - start, in] in `dtype`, as the format's own library gives them."""

    def check(self) -> None:
        """Whether rows have scales of their own, without reading codes.

        Raises:
            UnreadableError: They have not, or the format forbids what a product with c needs.
        """

    def times(self, c: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The module's tensors with row j times c[j], by key: codes untouched, scales (and offsets) multiplied.

        A negative c is allowed, because every format here multiplies by its scale, whatever the scale's sign.

        Args:
            c: [out], any floating dtype.
            dtype: What scales become whose readers take the model's own dtype (bf16 has too few digits for most c).
                Formats whose readers demand one dtype keep that. None: as they are stored.

        Raises:
            UnreadableError: As `check`, or a scale leaves its dtype's range.
        """


class Stored:
    """The tensors whose keys begin with one module's path, by what follows it."""

    def __init__(self, checkpoint: Checkpoint, path: str) -> None:
        self.checkpoint, self.path = checkpoint, path
        if checkpoint not in _names:
            _names[checkpoint] = _by_path(checkpoint)
        self.names = _names[checkpoint].get(path, [])
        self._read: dict[str, Tensor] = {}

    @property
    def options(self) -> dict[str, object]:
        """How the base was quantised, from its config.json."""
        config = self.checkpoint.config
        found = config.get("quantization_config", config.get("compression_config"))
        return found if isinstance(found, dict) else {}

    @property
    def method(self) -> str:
        """`quant_method`: gptq, awq, bitsandbytes ..."""
        return str(self.options.get("quant_method", "")).lower()

    def has(self, *names: str) -> bool:
        return all(name in self.names for name in names)

    def key(self, name: str) -> str:
        return f"{self.path}.{name}"

    def keys(self, *names: str) -> tuple[str, ...]:
        """The keys of those of these names that are stored."""
        return tuple(self.key(name) for name in names if name in self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.entries[self.key(name)].shape

    def dtype(self, name: str) -> torch.dtype | None:
        return self.checkpoint.entries[self.key(name)].dtype

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            self._read[name] = self.checkpoint.tensor(self.key(name))
        return self._read[name]

    def tensors(self, keys: tuple[str, ...]) -> dict[str, Tensor]:
        """Those of these keys, as they are stored."""
        return {key: self[key[len(self.path) + 1 :]] for key in keys}

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a tensor that has two dimensions.

        Raises:
            UnreadableError: It has another number.
        """
        shape = self.shape(name)
        if len(shape) != 2:
            raise self.error(f"'{name}' is of shape {list(shape)}", "two dimensions")
        return shape[0], shape[1]

    def floats(self, name: str) -> torch.dtype:
        """The dtype of scales in floating point.

        Raises:
            UnreadableError: They are in another.
        """
        dtype = self.dtype(name)
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            raise self.error(f"'{name}' is {dtype}", "scales in floating point of 16 bits or more")
        return dtype

    def error(self, found: str, expected: str, mend: str = DEQUANTIZE) -> UnreadableError:
        return UnreadableError(f"'{self.checkpoint.name}', module '{self.path}': {found}: expected {expected}; {mend}.")


def _by_path(checkpoint: Checkpoint) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in checkpoint.entries:
        for at, one in enumerate(key):
            if one == ".":
                found.setdefault(key[:at], []).append(key[at + 1 :])
    return found


def scaled(stored: Stored, scale: Tensor, c: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """c * scale, multiplied in fp64 and rounded once.

    Args:
        stored: Whose scales, for errors.
        scale: Of any shape.
        c: One that broadcasts against it.
        dtype: Of the outcome; None: that of `scale`.

    Raises:
        UnreadableError: A product is not finite in that dtype.
    """
    dtype = scale.dtype if dtype is None else dtype
    product = scale.double() * c.double()
    found = product.to(dtype)
    if not torch.isfinite(found).all():
        largest = float(product.abs().max())
        raise stored.error(
            f"c times its scales reaches {largest:.3g}", f"at most {torch.finfo(dtype).max:.3g} ({dtype})"
        )
    return found


def per_row(stored: Stored, c: Tensor, out_features: int) -> Tensor:
    """c, checked to be one finite number for each row.

    Raises:
        UnreadableError: It is not.
    """
    if tuple(c.shape) != (out_features,) or not torch.isfinite(c).all():
        found = f"c is of shape {list(c.shape)}" if c.shape != (out_features,) else "c has infinite numbers or NaN"
        raise stored.error(found, f"{out_features} finite numbers, one a row", "train or convert the adapter again")
    return c.detach().cpu()
