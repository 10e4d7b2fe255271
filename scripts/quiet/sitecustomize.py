"""Keep out of the demo's output what other libraries say about themselves. Nothing else is kept out.

Python imports a module of this name at its start, in whatever process: `scripts/demo.sh` puts this folder into
PYTHONPATH. A message is named by its logger or category, and by how it begins. The comments say which version gives it,
and why it tells a user of the demo nothing.
"""

import importlib.machinery
import importlib.util
import logging
import sys
import warnings
from pathlib import Path

MESSAGES = {
    # torchao 0.18: libraries for GPUs that its wheel holds beside those for CPUs; the demo uses none of them.
    "torchao": ("Failed to load ",),
    # bitsandbytes 0.50, imported by PEFT, on processors with AVX512-BF16: a faster product for 4-bit weights. The demo
    # has none.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # torch 2.13 about two enums of torchao 0.18, imported by transformers while it loads any model.
    "torch.utils._pytree": ("<enum 'KernelPreference'> is an Enum", "<enum 'ScaleCalculationMode'> is an Enum"),
}
WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # transformers 5.23 renamed the property that PEFT 0.21 reads.
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),
    # PEFT 0.21, saving an adapter: beside a GGUF file lies no config.json, and the demo adds no words.
    (UserWarning, "Could not find a config file in data/smollm2 - will assume that the vocabulary was not modified"),
)


class Without(logging.Filter):
    """Pass all messages but those that begin like one of `beginnings`."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


for logger, beginnings in MESSAGES.items():
    logging.getLogger(logger).addFilter(Without(beginnings))
for category, beginning in WARNINGS:
    warnings.filterwarnings("ignore", beginning, category)

# One of the system or of the user, which this one hides, runs all the same.
folders = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
spec = importlib.machinery.PathFinder.find_spec("sitecustomize", folders)
# A mere folder of that name has no loader, and nothing to run.
if spec and spec.loader:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
