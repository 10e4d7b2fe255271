"""Numbers that torch's and Triton's implementations share."""

from __future__ import annotations

import os

import torch

LOW_PRECISION = (torch.float16, torch.bfloat16)
# By the output's dtype: below this c, y = c z is subnormal or close to it; fp16's smallest normal number is 6e-5.
TINY = {torch.float64: 1e-30, torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 2.0**-8}
# By the output's dtype: |c z| / |b| below which too few digits of z are left in y; 2 bits of the 8 or 11 may go, in
# fp32 10 of 24.
DROWNED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}
# If v^2 is below this fraction of ||W0||^2 + s^2 ||BA||^2, the factored sum cancels: in fp32 its error grows to 1e-6 at
# 10 % and 1e-5 at 1 %. Such rows are computed densely, a few at a time.
CANCELLATION = 0.25


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, in its interpreter."""
    # what Triton takes for yes
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
