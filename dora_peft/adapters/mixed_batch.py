"""A batch in which every sample names its adapter: the names reach the layers through forward hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..layers import DoraLayer


@contextmanager
def named(tuner: BaseTuner, adapter_names: list[str], beams: int) -> Iterator[None]:
    """Hand the names to the layers for as long as this is open.

    Args:
        tuner: The DoraModel.
        adapter_names: One name per sample; "__base__" for none.
        beams: How often `generate` repeats every sample for its beams.

    Raises:
        ValueError: The model is in training mode, or there is no such adapter.
    """
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    known = {n for layer in tuner.modules() if isinstance(layer, DoraLayer) for n in layer.lora_magnitude_vector}
    unknown = sorted(set(adapter_names) - known - {"__base__"})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    encoder = tuner.model.get_encoder() if hasattr(tuner.model, "get_encoder") else None
    # Beam search repeats every sample for the decoder, while an encoder still sees each once.
    once = set() if encoder is None or encoder is tuner.model else set(encoder.modules())
    repeated = [name for name in adapter_names for _ in range(beams)]
    with ExitStack() as stack:
        for module in tuner.modules():
            if isinstance(module, (DoraLayer, AuxiliaryTrainingWrapper)):
                names = list(adapter_names) if module in once else repeated
                hook = module.register_forward_pre_hook(partial(_pass_names, names=names), with_kwargs=True)
                stack.callback(hook.remove)
        yield


def _pass_names(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], names: list[str]
) -> tuple[tuple[object, ...], dict[str, object]]:
    return args, {**kwargs, "adapter_names": names}
