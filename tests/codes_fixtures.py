"""Checkpoints of one quantised module, and what holds for the codes of every format."""

from dataclasses import dataclass, field

import torch

from dora_peft.adapters.export.codes import codes_of
from dora_peft.adapters.formats.checkpoint import Entry

PATH = "model.layers.0.mlp.up_proj"


@dataclass(eq=False)
class Held:
    """A checkpoint in memory."""

    tensors: dict
    config: dict
    name: str = "base"
    entries: dict = field(init=False)

    def __post_init__(self):
        self.entries = {key: Entry("held", tuple(one.shape), one.dtype) for key, one in self.tensors.items()}

    def tensor(self, key):
        return self.tensors[key]


def held(tensors, **options):
    """A module's tensors by the ends of their keys, with other modules around it."""
    others = {f"{PATH}s.weight": torch.zeros(2, 2), "model.norm.weight": torch.ones(3)}
    own = {f"{PATH}.{name}": one for name, one in tensors.items()}
    return Held({**others, **own}, {"quantization_config": options} if options else {})


def codes(checkpoint):
    found = codes_of(checkpoint, PATH)
    assert found is not None
    return found


def rescaled(checkpoint, c, dtype=None):
    """The checkpoint with what `times` gives in the place of the module's keys."""
    one = codes(checkpoint)
    rest = {key: value for key, value in checkpoint.tensors.items() if key not in one.keys}
    new = one.times(c, dtype)
    assert set(one.keys) <= set(checkpoint.tensors)
    assert not set(rest) & set(new)
    return Held({**rest, **new}, checkpoint.config)


def whole(one):
    return one.dequantise(0, one.out_features)


def packed(values, bits):
    """int32 words of codes [rows, count], the lowest bits first."""
    count = 32 // bits
    padded = torch.nn.functional.pad(values.long(), (0, -values.shape[1] % count)).view(len(values), -1, count)
    words = (padded << (torch.arange(count) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def same(a, b):
    """Whether two tensors are equal; torch.equal knows no 8-bit floats."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(one.contiguous().flatten().view(torch.uint8) for one in (a, b)))


def some_c(rows, spread=0.3, sign=False):
    c = 1 + spread * torch.randn(rows, dtype=torch.float64)
    if sign:
        c[::3] *= -1
    return c


def check_rows(checkpoint, scales=(), dtype=None, sign=True):
    """Row j is c[j] times what it was, up to one rounding of its scale and the last of each number; codes are the same.

    Args:
        scales: The ends of the keys that change.
    """
    one = codes(checkpoint)
    c = some_c(one.out_features, sign=sign)
    after = rescaled(checkpoint, c, dtype)
    two = codes(after)
    before, found = whole(one).double(), whole(two).double()
    # the scale is rounded once, and so is a product with it before and after
    eps = torch.finfo(two.dtype).eps / 2 + torch.finfo(one.dtype).eps / 2 + scale_eps(after, scales)
    expected = c[:, None] * before
    tiny = torch.finfo(two.dtype).smallest_normal
    torch.testing.assert_close(found, expected, rtol=1.1 * eps, atol=float(tiny))
    assert not torch.equal(found, before)
    for key, value in after.tensors.items():
        if key not in {f"{PATH}.{name}" for name in scales}:
            assert same(value, checkpoint.tensors[key])
    return two


def scale_eps(after, scales):
    floats = [after.tensors[f"{PATH}.{name}"].dtype for name in scales]
    return max(torch.finfo(one).eps / 2 for one in floats if one.is_floating_point)


def check_blocks(one):
    """Rows in pieces are the rows of the whole."""
    rows = whole(one)
    assert rows.shape == (one.out_features, one.in_features)
    assert rows.dtype == one.dtype
    for start, stop in ((0, 1), (1, one.out_features), (one.out_features // 2, one.out_features), (3, 3)):
        assert torch.equal(one.dequantise(start, stop), rows[start:stop])
