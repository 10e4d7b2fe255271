"""PeftMixedModel in PEFT 0.20.0 to 0.21.2: adapters of several kinds on one layer, by adding up what each adds.

DoRA adds nothing: it scales the whole row, W0 and the change alike, so beside another kind the result would depend on
an order that PeftMixedModel does not define. It is refused there, with the reason; PEFT's message lists kinds alone.
"""

from __future__ import annotations

import peft.mixed_model
from peft import PeftConfig

from ..config import DoraConfig
from .patching import Function, patch


def install() -> None:
    """Patch the check of PeftMixedModel."""
    patch(peft.mixed_model, "_check_config_compatible", _check)


def _check(original: Function) -> Function:
    def _check_config_compatible(peft_config: PeftConfig) -> None:
        if isinstance(peft_config, DoraConfig):
            raise ValueError(
                "DoRA is not available in PeftMixedModel (mixed=True), which adds up what adapters of several kinds "
                "add: DoRA scales W0 and the change alike, so the outcome would depend on an order that is not defined "
                "there. Use get_peft_model(model, config) without mixed=True, which takes several DoRA adapters; merge "
                "an adapter of another kind with merge_and_unload() first."
            )
        original(peft_config)

    return _check_config_compatible
