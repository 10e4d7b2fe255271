"""What all adapted layers share: state and life cycle. The formulas are in linear.py, functional.py and merging.py, the
refresh of the norm is in norms/, the kinds of layers in kinds.py.

Tensors carry PEFT's own names (`lora_A`, `lora_B`, `lora_magnitude_vector`, `lora_embedding_A`, `lora_embedding_B`), so
that checkpoints interchange with PEFT's `use_dora`. The initial factors come from PEFT's own LoRA layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import norms, reference
from ..bases import BaseWeight, base_weight, input_gradient, offload, unpack_for_gradient
from ..bases.inspection import check_creatable, linear_map
from ..bases.peft_names import in_out_features
from ..config import DoraConfig
from ..norms import ties
from ..ops import choice, functional
from ..ops.kept_output import Outputs, version
from . import merge
from .magnitude import Magnitude, warn_about_low_precision

# Base layers that wrap nothing and hold their weight in `weight`.
_LEAVES = {nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D}


class DoraLayer(BaseTunerLayer):
    """What all adapted layers share. Subclasses say how their factors look as matrices and how they adapt an output."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = (
        "r",
        "lora_alpha",
        "scaling",
        "use_rslora",
        "lora_dropout",
        "detach_norm",
        "dropout_mode",
        "magnitude_only",
    )
    training: bool  # nn.Module's
    _modules: dict[str, Any]
    peft_layer: type  # PEFT's LoRA layer of the same kind, which provides the initial factors

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: DoraConfig, name: str, **kwargs: Any) -> None:
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
        self.cast_input_dtype_enabled = True  # read by peft.helpers.disable_input_dtype_casting; inputs are never cast
        self.in_features, self.out_features = in_out_features(self.get_base_layer())
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self._norms: dict[str, norms.Norm] = {}
        self._base_norm: norms.BaseNorm | None = None
        self._outputs = Outputs(name)
        self.number = norms.register(self)
        self._seam: tuple[Any, Any, BaseWeight] | None = None
        self._shortcut: Any = None
        # the unmerged weight parameter while adapters are merged; in a tuple, so that it is not registered
        self._original: tuple[nn.Parameter] | None = None
        # where else the model uses the base module, without the adapter; found out by DoraModel
        self.other_names: list[str] = []
        # what has been said about the model already; its layers share one set
        self.notices: set[str] = set()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seam": None, "_shortcut": None, "_base_norm": None}  # a copy makes its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.number = norms.register(self)  # copied or unpickled

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self._base_norm is not None:
            self._base_norm.weight.let_go()
        for norm in self._norms.values():
            norm.device = None
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        # each replica computes on a device, and in a thread, of its own
        replica._norms = {name: norms.Norm(tied=n.tied, settled=n.settled) for name, n in self._norms.items()}
        replica._base_norm = replica._seam = replica._shortcut = None
        return replica

    def train(self, mode: bool = True) -> Any:
        super().train(mode)  # type: ignore[misc]
        if mode:
            for norm in self._norms.values():
                norm.folded = None  # what evaluation keeps beside A and B
            self._shortcut = None
        return self

    # ---- the base weight

    def get_base_layer(self) -> Any:
        base = self._modules["base_layer"]
        return (
            base if type(base) in _LEAVES else BaseTunerLayer.get_base_layer(self)
        )  # which asks each for one below, slowly

    def original_weight(self) -> Any:
        """The base layer's weight without any merged adapter, as stored (packed where quantised)."""
        if self._original is not None:
            return self._original[0]
        layer = self.get_base_layer()
        if type(layer) in _LEAVES:
            return layer.weight
        for name in ("weight", "qweight", "W_q"):
            if isinstance(getattr(layer, name, None), Tensor):
                return getattr(layer, name)
        return layer

    def held_weight(self) -> Any:
        """The weight parameter that the base layer holds; None if it is computed, offloaded, or kept in parts."""
        weight = self.get_base_layer()._parameters.get("weight")
        return None if weight is None or weight.is_meta else weight

    def base_weight(self) -> BaseWeight:
        """The seam to the base weight without any merged adapter."""
        original = None if self._original is None else self._original[0]
        layer = self.get_base_layer()
        if original is not None or type(layer) not in _LEAVES:
            return base_weight(layer, self.name, original)
        weight = layer.weight
        address = (weight.data_ptr(), weight.dtype, weight.device)
        seam = self._seam  # read once: another thread may replace it
        if seam is None or seam[0] is not weight or seam[1] != address:
            seam = self._seam = (weight, address, base_weight(layer, self.name))
        return seam[2]

    def base_weight_of(self, weight: Tensor) -> BaseWeight:
        """The seam to another weight in the place of the base layer's."""
        return base_weight(self.get_base_layer(), self.name, weight)

    def settle_late(self, adapter: str) -> None:
        """Find out which rows are tied, for an adapter that was loaded while W0 was not here."""
        with offload.at_hand(self.get_base_layer()):
            ties.settle_late(self, adapter)

    # ---- creation

    def update_layer(
        self, adapter_name: str, *, r: int, lora_alpha: float, config: DoraConfig, magnitude_only: bool = False
    ) -> None:
        """Create an adapter on this layer: factors from PEFT's initialisation, m = ||W0 + s B A||.

        Raises:
            ValueError: The base layer cannot be adapted, or not with this rank or initialisation. Nothing is created
                then.
        """
        base = self.get_base_layer()
        check_creatable(base, self.name, config.init_lora_weights)
        self._check_rank(r, self.base_weight())
        with offload.at_hand(base):
            weight = self.base_weight()
            zero = ties.rows_to_keep_zero(weight, config.init_lora_weights)
            initialised = self._peft_factors(adapter_name, r, lora_alpha, config, magnitude_only)
            self.r[adapter_name] = r
            self.lora_alpha[adapter_name] = lora_alpha
            self.scaling[adapter_name] = initialised.scaling[adapter_name]
            self.use_rslora[adapter_name] = config.use_rslora
            self.detach_norm[adapter_name] = config.detach_norm
            self.dropout_mode[adapter_name] = config.dropout_mode
            self.magnitude_only[adapter_name] = magnitude_only
            # an adapter added to a model in evaluation must not drop
            self.lora_dropout[adapter_name] = initialised.lora_dropout[adapter_name].train(self.training)
            for names in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
                created = getattr(initialised, names)
                if adapter_name in created:
                    getattr(self, names)[adapter_name] = created[adapter_name]
            factors = self.factor_parameters(adapter_name)
            if base_dtype := self._base_dtype():
                for factor in factors:
                    if factor.is_meta:  # PEFT gives real ones the base's dtype, from which autocasting starts
                        factor.data = factor.data.to(base_dtype)
            if magnitude_only:
                with torch.no_grad():
                    for factor in factors:
                        factor.zero_()
            if zero is not None:
                ties.keep_zero(self._as_matrix(base.weight), factors[1], zero)

            shape = self._magnitude_shape(weight.out_features)
            if weight.device.type == "meta" or any(factor.is_meta for factor in factors):
                value = torch.empty(shape, dtype=weight.dtype, device="meta")
                self._norms.pop(adapter_name, None)
            else:
                value = norms.initial(self, adapter_name).reshape(shape).clone()
            self.lora_magnitude_vector[adapter_name] = Magnitude(value)
        self._keep_resident(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _base_dtype(self) -> torch.dtype | None:
        """The dtype of a base weight that is stored as floating point numbers, None for any other."""
        weight = self.original_weight()
        return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter's tensors; PEFT's own also casts them to the base's dtype, and fp32 factors lose 16 bits."""
        if device is None:
            weight = self.base_weight()
            device = weight.device
        for name in self.adapter_layer_names:
            held = getattr(self, name)
            if adapter_name not in held or device.type == "meta":
                continue
            item = held[adapter_name]
            for parameter in [item] if isinstance(item, nn.Parameter) else item.parameters():
                if not parameter.is_meta:
                    parameter.data = parameter.data.to(device)

    def _keep_resident(self, adapter_name: str) -> None:
        for module in (self.lora_A, self.lora_B, self.lora_magnitude_vector):
            if adapter_name in module:
                offload.keep_resident(module[adapter_name])
        offload.keep_resident(self.lora_embedding_A)
        offload.keep_resident(self.lora_embedding_B)

    def _check_rank(self, r: int, weight: BaseWeight) -> None:
        # Beyond the longer side a rank is surely a mistake; up to there it only wastes parameters (a router of 8
        # outputs among all linear layers). The usual small ranks have to work on every layer, however narrow.
        largest = max(weight.out_features, weight.in_features, 16)
        if not isinstance(r, int) or r <= 0:
            raise ValueError(
                f"`r` should be a positive integer value but the value passed is {r} (module '{self.name}'). "
                "Change r or its entry in rank_pattern."
            )
        if r > largest:
            raise ValueError(
                f"Rank r={r} is larger than module '{self.name}' itself, whose weight is "
                f"{weight.out_features} x {weight.in_features}. Choose r <= "
                f"{min(weight.out_features, weight.in_features)}, for this module alone with "
                f"rank_pattern={{'{self.name}': ...}}."
            )

    def _peft_factors(
        self, adapter_name: str, r: int, lora_alpha: float, config: DoraConfig, magnitude_only: bool
    ) -> Any:
        """PEFT's own LoRA layer around the same base layer: its factors are taken over, the layer is dropped."""
        lora_config = config.to_lora_config(fan_in_fan_out=self.fan_in_fan_out)
        lora_config.r, lora_config.lora_alpha = r, lora_alpha  # type: ignore[assignment]
        if magnitude_only:
            lora_config.init_lora_weights = True
        allowed = (True, False, "gaussian", "lora_ga")
        if self.peft_layer is not lora.Linear and lora_config.init_lora_weights not in allowed:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} is not available for module '{self.name}' "
                f"({type(self.get_base_layer()).__name__}); PEFT has it for linear layers only. Use True, False or "
                "'gaussian', or leave the module out with exclude_modules."
            )
        return self.peft_layer(self.get_base_layer(), adapter_name, config=lora_config, r=r, lora_alpha=lora_alpha)

    def _magnitude_shape(self, out_features: int) -> tuple[int, ...]:
        return (out_features,)

    # ---- factors, norm and scale

    def factor_parameters(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B as stored."""
        modules = self._modules  # asked at every forward pass: three times as fast as by attributes
        return modules["lora_A"]._modules[adapter].weight, modules["lora_B"]._modules[adapter].weight

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] as matrices over the base weight's rows."""
        return self.as_matrices(*self.factor_parameters(adapter))

    def as_matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        return lora_A, lora_B

    def scale(self, adapter: str, *, differentiable: bool = False, known: norms.Snapshot | None = None) -> Tensor:
        """c = m / v, [out]; with the norm's gradient if `differentiable` and the adapter's config ask for it.

        `known` is the adapter's norm, if the caller has just asked for it.
        """
        trained = differentiable and not self.detach_norm[adapter] and torch.is_grad_enabled()
        if choice.use_reference() or choice.transforming() or choice.tracing():
            # v by plain operations: a transform's A and B are no parameters, and a recording has to hold for others
            # the same operations whether gradients are on or not: a tracer compares
            value, tied = self._dense_norm(adapter), self._tied(adapter)
            value = value if differentiable and not self.detach_norm[adapter] else value.detach()
        elif torch.compiler.is_compiling():
            value, tied = norms.traced(self, adapter)
            if trained and not self.magnitude_only[adapter]:
                value = functional.attach_norm_gradient(
                    value, self._dense_matrix(), *self.factors(adapter), self.scaling[adapter]
                )
        else:
            known = norms.weight_norm(self, adapter) if known is None else known
            value, tied = known.value, known.tied
            if trained and not self.magnitude_only[adapter]:
                lora_A, lora_B = self.factors(adapter)
                if lora_A.requires_grad or lora_B.requires_grad:
                    value = functional.weight_norm(
                        self.base_weight(), norms.base_squared(self), lora_A, lora_B, self.scaling[adapter], value
                    )
        return functional.scale(self.magnitude(adapter).view(-1), value, tied)

    def _tied(self, adapter: str) -> Tensor | None:
        """The rows whose magnitude follows their norm [out, bool], None if there are none."""
        norm = self._norms.get(adapter)
        if norm is None or not norm.settled:
            if choice.transforming() or choice.tracing():
                return None  # no value can be looked at
            norm = norms.settle(self, adapter)
        return norm.tied

    def _dense_norm(self, adapter: str) -> Tensor:
        """v [out] from the dense W0 + s B A, computed at every call, as in the reference."""
        matrix = self._wide_matrix()
        floor = functional.floor(matrix.detach().square().sum(1))
        if self.magnitude_only[adapter]:
            return torch.maximum(torch.linalg.vector_norm(matrix, dim=1), floor)
        lora_A, lora_B = (factor.to(matrix.dtype) for factor in self.factors(adapter))
        norm = reference.weight_norm(matrix, lora_A, lora_B, self.scaling[adapter])
        return torch.maximum(norm, floor)

    def _wide_matrix(self) -> Tensor:
        """W0 [out, in] in the dtype that norms are computed in."""
        stored, grouped = self.original_weight(), getattr(self.get_base_layer(), "groups", 1) > 1
        recorded = choice.tracing()  # the tensors of a recording are of other classes
        if isinstance(stored, Tensor) and (recorded or type(stored) in (Tensor, nn.Parameter)):
            if stored.is_floating_point() and not grouped:
                matrix = self._as_matrix(stored.detach())
                return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
            weight = self.base_weight_of(stored)
        else:
            weight = self.base_weight()
        if not weight.has_rows:
            raise RuntimeError(
                "The reference implementation, torch.func and recordings (torch.export, torch.jit.trace) need a dense "
                f"weight, which module '{self.name}' ({type(self.get_base_layer()).__name__}) cannot give. Use "
                "implementation('auto')."
            )
        return weight.dense()

    def _dense_matrix(self) -> Tensor:
        """W0 [out, in] as a view of the base layer's weight."""
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or getattr(base, "groups", 1) > 1:
            raise NotImplementedError(
                f"torch.compile with detach_norm=False needs a dense weight, which module '{self.name}' "
                f"({type(base).__name__}) has not. Use detach_norm=True, or train without compiling."
            )
        return self._as_matrix(weight)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def magnitude(self, adapter: str) -> nn.Parameter:
        """m as stored."""
        modules = self._modules
        return modules["lora_magnitude_vector"]._modules[adapter].weight

    # ---- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shortcut = self._shortcut
        if shortcut is not None and not args and not kwargs and shortcut.is_open(self):
            return shortcut(x, self)
        if type(self._modules["base_layer"]) not in _LEAVES:
            unpack_for_gradient(self.get_base_layer(), x, self.training)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        present = self.lora_magnitude_vector
        adapters = [name for name in self.active_adapters if name in present]
        if self.merged or not adapters:
            return self.base_layer(x, *args, **kwargs)
        if self.training and not torch.compiler.is_compiling():
            for adapter in adapters:
                warn_about_low_precision(self, adapter)
        if len(adapters) == 1 and not self._drops_base(adapters[0]) and not self._needs_autograd():
            return self.adapt_fast(adapters[0], x, *args, **kwargs)
        if len(adapters) == 1 and not args and not kwargs and torch.compiler.is_compiling():
            compiled = self.adapt_compiled(adapters[0], x)
            if compiled is not None:
                return compiled
        return self.adapt_plainly(adapters, x, *args, **kwargs)

    def _needs_autograd(self) -> bool:
        """Whether to keep what plain operations keep: to compute the base output again might give another one.

        Hooks of the user's may draw random numbers, count, or be gone by then. So may the forward of a subclass.
        """
        base = self._modules["base_layer"]
        return choice.by_autograd() or bool(base._forward_hooks or base._forward_pre_hooks) or self._own_forward(base)

    def _own_forward(self, base: Any) -> bool:
        """Whether `base` is no plain layer of this kind, but computes otherwise with a plain weight."""
        return False

    def _drops_base(self, adapter: str) -> bool:
        """Whether the paper's dropout is at work, which needs a second base product and its own intermediate."""
        if self.dropout_mode[adapter] != "paper" or not self.training:
            return False
        return isinstance(self.lora_dropout[adapter], nn.Dropout)

    def adapt_plainly(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the layer with adapters composed in this order, by plain operations."""
        z, dtype = self._base_product(x, *args, **kwargs)
        for adapter in adapters:
            z = self.adapt(adapter, x, z, self._bias() if adapter == adapters[-1] else None, dtype)
        return z

    def adapt(self, adapter: str, x: Tensor, z: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """c * (z + s B A x) + b in `dtype`, for z without b: a rounded output with b may have lost what m needs."""
        c = self._per_channel(self.scale(adapter, differentiable=True))
        dropped = self._dropped(adapter, x)
        low_rank = None if self.magnitude_only[adapter] else self._low_rank(adapter, dropped).to(z.dtype)
        if self._drops_base(adapter):
            return functional.compose_paper(z, self._base_product(dropped)[0], low_rank, c, bias, dtype)
        return functional.compose(z if low_rank is None else z + low_rank, c, bias, dtype)

    def adapt_fast(self, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the layer with one adapter, keeping less for the backward pass than `adapt` does."""
        if not torch.is_grad_enabled():
            return self.adapt_plainly([adapter], x, *args, **kwargs)
        product, scaling = self._pinned_product(args, kwargs), self.scaling[adapter]
        needed = [x]
        if not self.magnitude_only[adapter]:
            needed += [self._dropped(adapter, x), *self.factor_parameters(adapter)]

        def before_scaling(x: Tensor, *branch: Tensor) -> Tensor:
            z, _ = product(x)
            if not branch:
                return z
            dropped, lora_A, lora_B = branch
            return z + self._low_rank(adapter, dropped, lora_A, lora_B, scaling).to(z.dtype)

        # before v is asked for: the call may compute the base weight anew, as weight_norm's hook does
        z, dtype = product(x)
        if not self.magnitude_only[adapter]:
            z = z + self._low_rank(adapter, needed[1]).to(z.dtype)
        c = self._per_channel(self.scale(adapter, differentiable=True))
        again = functional.as_now(before_scaling, x.device.type)
        return functional.compose_keeping_output(z, c, self._bias(), dtype, again, self._outputs, *needed)

    def _base_product(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, torch.dtype]:
        """x W0^T without b, in the shape of the output, and the dtype of the output.

        Where the base layer gives it with b only, b is subtracted in fp32, which cannot bring back what was rounded.
        """
        weight = None if args or kwargs else self._dense_weight()
        if weight is not None:
            z = self._multiply(x, weight)
            return z, z.dtype
        bias = self._bias()
        if bias is not None and not args and not kwargs and (twin := self._without_bias(x)) is not None:
            out = twin(x)
            return out, out.dtype
        out = self._base_output(x, *args, **kwargs)
        if bias is None:
            return out, out.dtype
        wide = torch.promote_types(out.dtype, torch.float32)
        return out.to(wide) - bias.to(wide), out.dtype

    def _without_bias(self, x: Tensor) -> nn.Module | None:
        """What computes the base layer's product without its bias, None if the layer itself has to be called."""
        base = self.base_layer
        if torch.compiler.is_compiling() or choice.tracing() or base is not self.get_base_layer() or not x.numel():
            return None
        if torch.is_grad_enabled() and not input_gradient.gives_gradient(base):
            return None
        module, bias = linear_map(base, x)
        return module if bias is None else None

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer gives, with the right gradient for x. Not to be changed in place."""
        base = self.get_base_layer()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not input_gradient.gives_gradient(base):
            return input_gradient.call(self.base_layer, self.base_weight, x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _pinned_product(self, args: Any, kwargs: Any) -> Callable[[Tensor], tuple[Tensor, torch.dtype]]:
        """`_base_product` of x by the base weight of this moment: a backward pass may come after it was exchanged."""
        weight = None if args or kwargs else self._dense_weight()
        if weight is not None:
            before = version(weight)

            def multiply(x: Tensor) -> tuple[Tensor, torch.dtype]:
                if version(weight) != before:
                    raise changed_too_early(self.name)
                z = self._multiply(x, weight)
                return z, z.dtype

            return multiply
        stored = self.held_weight()

        def call(x: Tensor) -> tuple[Tensor, torch.dtype]:
            if self.held_weight() is not stored:
                raise changed_too_early(self.name)
            return self._base_product(x, *args, **kwargs)

        return call

    def _dense_weight(self) -> Tensor | None:
        """W0 if the base layer does nothing but multiply by it, so that `_multiply` may stand for its forward: no
        subclass with a forward of its own, no hooks (offloading), no tensor subclass, nothing trained."""
        base: Any = self.base_layer
        if not self._multiplies(type(base).forward) or "forward" in base.__dict__:
            return None
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return None
        weight = base._parameters.get("weight")
        if type(weight) not in (Tensor, nn.Parameter) or weight.requires_grad or not weight.is_floating_point():
            return None
        return self._oriented(weight)

    def _multiplies(self, forward: Any) -> bool:
        """Whether `_multiply` computes what this forward method of a base layer does, but for b."""
        return False

    def _oriented(self, weight: Tensor) -> Tensor:
        """The base layer's weight as `_multiply` takes it."""
        return weight

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W0^T without b, differentiable."""
        raise NotImplementedError

    def adapt_compiled(self, adapter: str, x: Tensor) -> Tensor | None:
        """The output of the layer by an operator for torch.compile, None where plain operations serve as well."""
        return None

    def _low_rank(
        self,
        adapter: str,
        x: Tensor,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float | None = None,
    ) -> Tensor:
        """s B A x, in the shape of the layer's output; with the adapter's own factors and s where None."""
        raise NotImplementedError

    def _dropped(self, adapter: str, x: Tensor) -> Tensor:
        """The input of the low-rank branch."""
        return self.lora_dropout[adapter](x)

    def _bias(self) -> Tensor | None:
        """b in the shape that broadcasts against the layer's output."""
        base = self.get_base_layer()
        bias = getattr(base, "bias", None)
        if bias is not None and bias.is_meta:
            bias = offload.read(base, "bias")
        return None if bias is None else self._per_channel(bias)

    def _per_channel(self, vector: Tensor) -> Tensor:
        """[out] in the shape that broadcasts against the layer's output."""
        return vector

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        z, dtype = self._base_product(x, *args, **kwargs)
        for adapter in sorted(set(adapter_names)):
            if adapter not in self.lora_magnitude_vector:  # "__base__" among them
                continue
            index = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=z.device)
            z = z.index_copy(0, index, self.adapt(adapter, x[index.to(x.device)], z[index], None, z.dtype))
        bias = self._bias()
        return (z if bias is None else z + bias).to(dtype)

    # ---- merging

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

    def _mergeable(self) -> bool:
        return True

    def _merge_obstacle(self) -> str:
        return "its weight cannot be written back."

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W0 in the base weight's own layout; what `peft.convert_to_lora` decomposes."""
        return merge.delta_weight(self, adapter)

    def _to_layout(self, delta: Tensor) -> Tensor:
        return delta

    # ---- life cycle

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._norms.pop(adapter_name, None)

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

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_zero_factors()

    def _freeze_zero_factors(self) -> None:
        for adapter, only in self.magnitude_only.items():
            if only:
                for factor in self.factor_parameters(adapter):
                    factor.requires_grad_(False)

    def initial_scaling(self, adapter: str) -> float:
        """s before anyone rescaled the adapter, lora_alpha / r or / sqrt(r): what a checkpoint is written for."""
        return float(self.lora_alpha[adapter] / reference.alpha_divisor(self.r[adapter], self.use_rslora[adapter]))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scaling to `scale` times its initial one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters by `scale`; the norm follows."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`, or reset it if None."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                if scale is None:
                    self.set_scale(adapter, 1.0)
                else:
                    self.scaling[adapter] /= scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.base_weight().has_rows and self._mergeable()

    def __repr__(self) -> str:
        return "dora." + super().__repr__()


def changed_too_early(name: str) -> RuntimeError:
    return RuntimeError(
        f"The base weight of module '{name}' was changed between the forward and the backward pass that needs it. "
        "Change base weights before the forward pass, or after backward."
    )
