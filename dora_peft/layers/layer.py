"""What all adapted layers share: state and life cycle. How they compute is in forward.py, linear.py and shortcut.py.

Tensors carry PEFT's own names (`lora_A`, `lora_B`, `lora_magnitude_vector`, `lora_embedding_A`, `lora_embedding_B`), so
that checkpoints interchange with PEFT's `use_dora`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import norms, reference
from ..bases import BaseWeight, base_weight, unpack_for_gradient
from ..bases.inspection import stored_weight
from ..bases.offload import at_hand
from ..bases.peft_names import in_out_features
from ..config import DoraConfig
from ..norms import ties
from ..ops import choice
from ..ops.overwritten import Outputs
from . import called, create, merge
from .forward import adapt_keeping_output, adapt_mixed, adapt_plainly, drops_base, may_differ_again
from .kind import Kind
from .magnitude import Magnitude, warn_about_low_precision
from .scale import scale_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from .shortcut import Shortcut

# Base layers that wrap nothing and hold their weight in `weight`.
_LEAVES = {nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D}


class DoraLayer(BaseTunerLayer):
    """What all adapted layers share. Subclasses name their kind and PEFT's layer of it."""

    adapter_layer_names: tuple[str, ...] = tuple(
        f"lora_{name}" for name in ("A", "B", "embedding_A", "embedding_B", "magnitude_vector")
    )
    other_param_names: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "use_rslora",
        "lora_dropout",
        "detach_norm",
        "dropout_mode",
        "magnitude_only",
    )
    # PEFT's LoRA layer of the same kind, which provides the initial factors
    peft_layer: type
    kind: Kind
    # nn.Module's
    training: bool
    _modules: dict[str, nn.Module | None]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: DoraConfig,
        name: str,
        *,
        r: int,
        lora_alpha: float,
        magnitude_only: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]
        self.base_layer = base_layer
        self.name = name
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.detach_norm: dict[str, bool] = {}
        self.dropout_mode: dict[str, str] = {}
        self.magnitude_only: dict[str, bool] = {}
        self.lora_dropout = nn.ModuleDict({})
        self.lora_A = nn.ModuleDict({})
        self.lora_B = nn.ModuleDict({})
        self.lora_embedding_A = nn.ParameterDict({})
        self.lora_embedding_B = nn.ParameterDict({})
        self.lora_magnitude_vector = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # read by peft.helpers.disable_input_dtype_casting; inputs are never cast
        self.cast_input_dtype_enabled = True
        self.in_features, self.out_features = in_out_features(self.get_base_layer())
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self._norms: dict[str, norms.Norm] = {}
        self._base_norm: norms.BaseNorm | None = None
        self._outputs = Outputs(name)
        self.number = norms.register(self)
        self._shortcut: Shortcut | None = None
        # the unmerged weight parameter while adapters are merged; in a tuple, so that it is not registered
        self._original: tuple[nn.Parameter] | None = None
        # the other names under which the model uses the base module, without the adapter; found out by DoraModel
        self.other_names: list[str] = []
        # what has been said about the model already; its layers share one set
        self.notices: set[str] = set()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r=r, lora_alpha=lora_alpha, config=config, magnitude_only=magnitude_only)

    def __getstate__(self) -> dict[str, object]:
        # a copy makes these itself
        return {**self.__dict__, "_shortcut": None, "_base_norm": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        # copied or unpickled
        self.number = norms.register(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DoraLayer:
        norms.let_go(self)
        self._shortcut = None
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _replicate_for_data_parallel(self) -> DoraLayer:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        # each replica computes on another device, and in another thread
        norms.replicate(self, replica)
        replica._shortcut = None
        return replica

    def train(self, mode: bool = True) -> Self:
        super().train(mode)  # type: ignore[misc]
        if mode:
            norms.leave_evaluation(self)
            if self._shortcut is not None and self._shortcut.folded is not None:
                self._shortcut = None
        return self

    def get_base_layer(self) -> nn.Module:
        base = self._modules["base_layer"]
        # BaseTunerLayer walks the chain of wrappers; skip that for plain layers
        return base if base is not None and type(base) in _LEAVES else BaseTunerLayer.get_base_layer(self)

    def original_weight(self) -> norms.Stored:
        """The base layer's weight without any merged adapter, as stored (packed if quantised)."""
        return self._original[0] if self._original is not None else stored_weight(self.get_base_layer())

    def base_weight(self, weight: Tensor | None = None) -> BaseWeight:
        """The seam to the base weight without any merged adapter, or to another weight in its place."""
        if weight is None and self._original is not None:
            weight = self._original[0]
        return base_weight(self.get_base_layer(), self.name, weight)

    def settle_late(self, adapter: str) -> None:
        """Find out which rows are tied, for an adapter that was loaded while W0 was not here."""
        with at_hand(self.get_base_layer()):
            ties.settle_late(self, adapter)

    def update_layer(
        self, adapter_name: str, *, r: int, lora_alpha: float, config: DoraConfig, magnitude_only: bool = False
    ) -> None:
        """Create an adapter on this layer: factors from PEFT's initialisation, m = ||W0 + s B A||.

        Raises:
            ValueError: The base layer cannot be adapted, or not with this rank or initialisation. Nothing is created
                then.
        """
        create.create(self, adapter_name, r, lora_alpha, config, magnitude_only)
        self._shortcut = None
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Initialise an adapter anew, in place; see `create.reset`."""
        create.reset(self, adapter_name, init_lora_weights)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter's tensors; PEFT's own also casts them to the base's dtype, and fp32 factors lose 16 bits."""
        create.move_adapter(self, adapter_name, self.base_weight().device if device is None else device)

    def factor_parameters(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B as stored."""
        # asked at every forward pass: three times as fast as by attributes
        modules = self._modules
        return modules["lora_A"]._modules[adapter].weight, modules["lora_B"]._modules[adapter].weight  # type: ignore[union-attr, return-value]

    def factor_modules(self, adapter: str) -> tuple[nn.Module, nn.Module]:
        """What holds A and B."""
        modules = self._modules
        return modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]  # type: ignore[union-attr, return-value]

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] as matrices over the base weight's rows, outside of a forward pass."""
        called.write_weights(*self.factor_modules(adapter), self.lora_magnitude_vector[adapter])
        return self.as_matrices(*self.factor_parameters(adapter))

    def as_matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """A and B as stored, as matrices [r, in] and [out, r]."""
        return self.kind.as_matrices(self.get_base_layer(), lora_A, lora_B)

    def magnitude(self, adapter: str) -> nn.Parameter:
        """m as stored."""
        return self._modules["lora_magnitude_vector"]._modules[adapter].weight  # type: ignore[union-attr, return-value]

    def scale(self, adapter: str, *, differentiable: bool = False) -> Tensor:
        """c = m / v, [out]; with the norm's gradient if `differentiable` and the adapter's config ask for it."""
        return scale_of(self, adapter, differentiable=differentiable)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        # read once: another thread may replace it
        shortcut = None if torch.compiler.is_compiling() else self._shortcut
        if shortcut is not None and not args and not kwargs:
            y = shortcut(self, self, x)
            if y is not None:
                return y
        if type(self._modules["base_layer"]) not in _LEAVES:
            unpack_for_gradient(self.get_base_layer(), x, self.training)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return adapt_mixed(self, x, adapter_names, args, kwargs)
        present = self.lora_magnitude_vector
        adapters = [name for name in self.active_adapters if name in present]
        if self.merged or not adapters:
            return self.base_layer(x, *args, **kwargs)
        if self.training and not torch.compiler.is_compiling():
            for adapter in adapters:
                warn_about_low_precision(cast(Magnitude, present[adapter]), self.name, self.notices)
        return self._adapted(adapters, x, args, kwargs)

    def _adapted(
        self, adapters: list[str], x: Tensor, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Tensor:
        how = choice.decide(x.device, x.dtype)
        if len(adapters) == 1 and not drops_base(self, adapters[0]):
            if how in ("torch", "triton"):
                if not may_differ_again(self) and not called.has_to_call(self, adapters[0]):
                    return self.adapt_fast(adapters[0], how, x, args, kwargs)
            elif how == "compiled" and not args and not kwargs and not called.has_to_call(self, adapters[0]):
                compiled = self.adapt_compiled(adapters[0], x)
                if compiled is not None:
                    return compiled
        return adapt_plainly(self, adapters, how, x, args, kwargs)

    def adapt_fast(
        self, adapter: str, how: choice.How, x: Tensor, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Tensor:
        """The output with one adapter, keeping less for the backward pass than plain operations do."""
        return adapt_keeping_output(self, adapter, how, x, args, kwargs)

    def adapt_compiled(self, adapter: str, x: Tensor) -> Tensor | None:
        """The output by an operator for torch.compile, None if plain operations serve as well."""
        return None

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, offload_original: bool = False
    ) -> None:
        """Write W' into the base layer; the original parameter is kept and restored by `unmerge` bit for bit.

        Several adapters compose in order, c_n (... c_1 (W0 + d_1) ... + d_n), with one rounding at the end.

        Args:
            safe_merge: Refuse a result that is not finite, before the base layer is touched.
            adapter_names: The active ones if None.
            offload_original: Keep the original on the CPU until `unmerge` (dense base weights only).

        Raises:
            NotImplementedError: The weight cannot be written, see `check_mergeable`.
            ValueError: With `safe_merge`, the merged weight is not finite. The base layer is as before in either case.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_magnitude_vector]
        merge.merge(self, names, safe_merge, offload_original)

    def adapters_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Those of the given adapters, or of the active ones if None, that `merge` would write."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [n for n in names if n in self.lora_magnitude_vector and n not in self.merged_adapters]

    def check_mergeable(self, *, brought_in: bool = True) -> None:
        """Raise a NotImplementedError unless a merged weight can be written and stays, see `merge.check_mergeable`."""
        merge.check_mergeable(self, brought_in)

    def unmerge(self) -> None:
        """Restore the original weight parameter, bit for bit."""
        merge.unmerge(self)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W0 in the base weight's own layout; what `peft.convert_to_lora` decomposes."""
        return merge.delta_weight(self, adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        norms.drop(self, adapter_name)
        self._shortcut = None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        present = [name for name in names if name in self.lora_magnitude_vector]
        paper = [n for n in present if self.dropout_mode[n] == "paper" and isinstance(self.lora_dropout[n], nn.Dropout)]
        if len(present) > 1 and paper:
            raise ValueError(
                f"Adapter '{paper[0]}' uses dropout_mode='paper', which is not defined for several active adapters "
                f"({', '.join(present)}, module '{self.name}'). Use dropout_mode='branch' or lora_dropout=0."
            )
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_zero_factors()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_zero_factors()

    def _freeze_zero_factors(self) -> None:
        for adapter in [name for name, only in self.magnitude_only.items() if only]:
            for held in (self.lora_A, self.lora_B, self.lora_embedding_A, self.lora_embedding_B):
                if adapter in held:
                    held[adapter].requires_grad_(False)

    def initial_scaling(self, adapter: str) -> float:
        """s before anyone rescaled the adapter, lora_alpha / r or / sqrt(r): what a checkpoint is written for."""
        return float(self.lora_alpha[adapter] / reference.alpha_divisor(self.r[adapter], self.use_rslora[adapter]))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scaling to `scale` times its initial one; in place where it is a tensor, see hotswap.py."""
        if adapter in self.scaling:
            value, old = scale * self.initial_scaling(adapter), self.scaling[adapter]
            self.scaling[adapter] = old.fill_(value) if isinstance(old, Tensor) else value

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters by `scale`; the norm follows."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`, or reset it if None."""
        for adapter in [name for name in self.active_adapters if name in self.scaling]:
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can decompose W' - W0: it writes matrices, for linear layers alone."""
        return False

    def __repr__(self) -> str:
        return "dora." + super().__repr__()
