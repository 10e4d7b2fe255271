"""DoRA (weight-decomposed low-rank adaptation), a tuner for PEFT.

    from peft import get_peft_model
    from dora_peft import DoraConfig

    model = get_peft_model(model, DoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

Importing the package registers `PeftType.DORA`, `DoraConfig` and `DoraModel` with PEFT.
"""

from .config import DoraConfig
from .layers import DoraLayer
from .model import DoraModel
from .norms import checking, refresh
from .ops.choice import implementation
from .ops.overwritten import on_overwritten_output
from .optim import param_groups
from .plugin import register as _register
from .plugin.use_dora import accelerate_use_dora

__version__ = "0.1.0"
__all__ = [
    "DoraConfig",
    "DoraLayer",
    "DoraModel",
    "__version__",
    "accelerate_use_dora",
    "checking",
    "implementation",
    "on_overwritten_output",
    "param_groups",
    "refresh",
]

_register()
