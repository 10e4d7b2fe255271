"""DoraModel: find the target modules and wrap them, merge, and mix adapters in a batch; a tuner on PEFT's BaseTuner."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists, replicate_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, save_and_load
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from . import norms
from .adapters import combine, hotswap, initial, mixed_batch, targets
from .adapters.checkpoint import from_checkpoint, to_checkpoint
from .adapters.merge import check_merge, merge_layers, remember_token_tables, unmerge_layers
from .adapters.names import exactly
from .adapters.undo import restored_on_failure, switched
from .bases import scratch
from .config import DoraConfig
from .layers import DoraLayer, merge_checks
from .layers.magnitude import Magnitude
from .ops.overwritten import Report


class DoraModel(BaseTuner):
    """The tuner that `get_peft_model` builds for a DoraConfig.

    Whatever ends one of its operations half-way, an error or Ctrl-C, leaves the model as it was.

    Args:
        model: The base model, adapted in place.
        peft_config: The adapter's configuration, or {name: configuration}.
        adapter_name: Its name.
        low_cpu_mem_usage: Create the adapter on the meta device, to be filled by a checkpoint.
        state_dict: A checkpoint whose keys say which modules to adapt, instead of the configuration.
    """

    prefix = "lora_"
    tuner_layer_cls = DoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]
    peft_config: dict[str, DoraConfig]  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        with restored_on_failure(model):
            super().__init__(
                model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
            )

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Create an adapter on the modules that its config targets.

        Args:
            model: The model, adapted in place.
            adapter_name: A name in `peft_config`.
            autocast_adapter_dtype: Not used, as in PEFT.
            low_cpu_mem_usage: Create the adapter on the meta device.
            state_dict: A checkpoint whose keys say which modules to adapt.

        Raises:
            ValueError: A module that the config names is not there or cannot be adapted.
        """
        try:
            with restored_on_failure(model):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
                targets.check_found(model, adapter_name, self.peft_config[adapter_name])
                targets.keep_called(model)
                self._introduce_layers(model)
                norms.gather(model)
        except ValueError as error:
            clearer = targets.with_names(error, model)
            if clearer is None:
                raise
            raise clearer from error

    @staticmethod
    def _introduce_layers(model: nn.Module) -> None:
        """Have the layers know of each other, and say once per model what they would each say."""
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, DoraLayer)]
        merge_checks.note_other_names(model, layers)
        reports = [layer._outputs.report for _, layer in layers if layer._outputs.report is not None]
        report = reports[0] if reports else Report()
        for _, layer in layers:
            layer.notices, layer._outputs.report = layers[0][1].notices, report

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, str]) -> PeftConfig:
        config = cast(DoraConfig, peft_config)
        if config.target_modules is None and config.magnitude_only_modules:
            config.target_modules = set(self.target_module_mapping.get(model_config["model_type"], ()))
        return super()._prepare_adapter_config(config, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        config = cast(DoraConfig, peft_config)
        if config.layer_replication:
            replicate_layers(model, config.layer_replication)
        for field in ("target_modules", "magnitude_only_modules"):
            value = getattr(config, field)
            if isinstance(value, str) and value.lower() == "all-linear":
                setattr(config, field, targets.all_linear(model, config))
        config.magnitude_only_ranks.clear()

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        # What PEFT returns for an excluded module is false, but not False.
        found = check_target_module_exists(peft_config, key)
        return targets.is_magnitude_only(cast(DoraConfig, peft_config), key) or found

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        targets.check_called(model, target_name)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(DoraConfig, peft_config)
        pattern = get_pattern_key(list(config.rank_pattern), current_key)
        r = config.rank_pattern.get(pattern, config.r)
        pattern = get_pattern_key(list(config.alpha_pattern), current_key)
        lora_alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
        magnitude_only = targets.is_magnitude_only(config, current_key)
        base = target.get_base_layer() if isinstance(target, DoraLayer) else target
        if magnitude_only:
            # The smallest rank that the layer can have; plain PEFT learns it from the exact rank_pattern entry.
            r = getattr(base, "groups", 1)
            config.magnitude_only_ranks[exactly(current_key)] = r
        initial.remember_weight(base, config)
        options: targets.LayerOptions = {
            "r": r,
            "lora_alpha": lora_alpha,
            "config": config,
            "magnitude_only": magnitude_only,
        }
        if isinstance(target, DoraLayer):
            target.update_layer(adapter_name, **options)
            return
        new_module = targets.wrapped(target, adapter_name, parent, current_key, options)
        if adapter_name not in self.active_adapters:
            # An additional adapter is trained only once it is activated.
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own copies child.weight onto an unwrapped module, which fails for a TrainableTokensWrapper (0.20, 0.21)
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        # Asked for by name: every adapter tensor in the dtype of its base layer, magnitudes included.
        for layer in self.model.modules():
            if isinstance(layer, DoraLayer) and adapter_name in layer.lora_magnitude_vector:
                dtype = layer.factor_parameters(adapter_name)[0].dtype
                magnitude = layer.lora_magnitude_vector[adapter_name]
                if isinstance(magnitude, Magnitude):
                    magnitude.cast(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: object, **kwargs: object) -> Iterator[None]:
        """Hand `adapter_names`, one per sample, to the layers (inference only), and one buffer for their refreshes."""
        adapter_names = cast("list[str] | None", kwargs.pop("adapter_names", None))
        if adapter_names is None:
            # a compiler has no use for the buffer, and could not follow
            if torch.compiler.is_compiling():
                yield
                return
            with scratch.kept():
                yield
            return
        beams = cast("int | None", kwargs.get("num_beams")) or 1
        with scratch.kept(), mixed_batch.named(self, adapter_names, beams=beams):
            yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one or several adapters the active ones."""
        with restored_on_failure(self, modules=switched(self)):
            super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter."""
        with restored_on_failure(self):
            super().delete_adapter(adapter_name)

    def _check_merge_allowed(self) -> None:
        with warnings.catch_warnings():
            # PEFT warns that merging a tied table leads to complications; here it is untied, and said so
            warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
            super()._check_merge_allowed()

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, offload_original: bool = False
    ) -> None:
        """Write the adapters into the base weights; `unmerge_adapter` restores the originals bit for bit.

        Costs a second copy of every adapted weight until then, on the same device or, with `offload_original`, on the
        CPU. `merge_and_unload` keeps one on the CPU, and only until it returns.

        Args:
            adapter_names: The active ones if None.
            safe_merge: Refuse a result that is not finite.
            offload_original: Keep the originals on the CPU (dense base weights only). A weight that another module
                uses as well stays where it is.

        Raises:
            NotImplementedError: A module's weight cannot be written.
            ValueError: With `safe_merge`, a merged weight is not finite. The model is as before in either case.
        """
        self._check_merge_allowed()
        check_merge(self.model, adapter_names, for_good=False)
        with restored_on_failure(self):
            merge_layers(self.model, adapter_names, safe_merge, offload_original)

    def unmerge_adapter(self) -> None:
        """Restore the original base weights, bit for bit."""
        with restored_on_failure(self):
            unmerge_layers(self.model)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if not merge:
            with restored_on_failure(self):
                super()._unload_and_optionally_merge(False, progressbar)
                norms.scatter(self.model)
            return self.model
        self._check_merge_allowed()
        check_merge(self.model, adapter_names, for_good=True)
        with restored_on_failure(self), warnings.catch_warnings():
            remember_token_tables(self.model)
            merge_layers(self.model, adapter_names, safe_merge, offload_original=True, progressbar=progressbar)
            # PEFT goes through the layers again, to unload them.
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            super()._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names)
            norms.scatter(self.model)
        return self.model

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
        **unsupported: object,
    ) -> None:
        """Add the adapter whose merged weight is W0 + sum_i w_i (W'_i - W0).

        Args:
            adapters, weights: Names and weights w_i of the adapters to combine.
            adapter_name: Name of the new adapter; nothing happens if it exists.
            combination_type: "cat" is exact, of rank sum_i r_i. "svd" approximates its low-rank part at `svd_rank` (the
                largest r_i if None) and keeps the magnitudes' exact ratio to the norm.

        Raises:
            ValueError: Another combination_type of PEFT's. Those combine A and B alone, and W' is not linear in them.
        """
        if adapter_name in self.peft_config:
            return
        combine.check(self.peft_config, adapters, weights, combination_type, unsupported)
        weighted = list(zip(adapters, weights, strict=True))
        combine.add_combined(self, weighted, adapter_name, combination_type, svd_rank)

    def hotswap_adapter(self, path: str, adapter_name: str = "default", torch_device: str | None = None) -> None:
        """Replace an adapter's tensors and scalings by those of another checkpoint, in place.

        Args:
            path: The checkpoint's folder or Hub repository.
            adapter_name: The adapter to replace.
            torch_device: Where to read the checkpoint to; PEFT's choice if None.

        Raises:
            ValueError: The adapter is merged, or the checkpoint targets other modules, has larger ranks, or other
                options that change the output; the old adapter is then untouched.
        """
        hotswap.swap(self.model, self.peft_config, path, adapter_name, torch_device)

    # PEFT 0.21 calls these three for checkpoints; for 0.20 plugin/peft_020.py does.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return to_checkpoint(model, adapter_name, tensors, cast(DoraConfig, config))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors = from_checkpoint(model, adapter_name, state_dict, cast(DoraConfig, config))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: nn.Module,
        peft_config: PeftConfig,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, Tensor],
        kwargs: object,
    ) -> dict[str, Tensor]:
        tensors = save_and_load.load_peft_weights(path_initial_model_for_weight_conversion, device="cpu")
        return initial.subtract_initial(output_state_dict, tensors, cast(DoraConfig, peft_config))

    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: object = None
    ) -> dict[str, Tensor]:
        """A checkpoint over the base weight without an initialisation's change; PEFT 0.20 calls this.

        Args:
            output_state_dict: The trained adapter's tensors.
            adapter_name: The initial adapter, loaded beside it.
            kwargs: Not used.
        """
        return initial.subtract_loaded_initial(self, output_state_dict, adapter_name, self.peft_config[adapter_name])
