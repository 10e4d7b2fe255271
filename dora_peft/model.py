"""DoraModel: find the target modules, wrap them, combine and unload adapters; a tuner on PEFT's BaseTuner."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    onload_layer,
    replicate_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper, save_and_load
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn

from . import norms
from ._row_ranges import bare, to_mask
from .adapters.checkpoint import from_checkpoint, to_checkpoint
from .config import DoraConfig
from .layers import merge_checks
from .layers.kinds import layer_class
from .layers.layer import DoraLayer
from .ops import merging
from .ops.kept_output import Report

# Modules whose weight these architectures use without calling the module, so that an adapter would never run
# (peft.tuners.tuners_utils._check_lora_target_modules_mamba, which looks at PEFT's own types only).
_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_MODULES = {"out_proj", "conv1d"}


class DoraModel(BaseTuner):
    """The tuner that `get_peft_model` builds for a DoraConfig.

    Args:
        model: The base model, adapted in place.
        config: The adapter's configuration.
        adapter_name: Its name.
        low_cpu_mem_usage: Create the adapter on the meta device, to be filled by a checkpoint.
    """

    prefix = "lora_"
    tuner_layer_cls = DoraLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # ---- finding and wrapping

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        undo = Undo(model, adapter_name)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            config: Any = self.peft_config[adapter_name]
            found = any(isinstance(m, DoraLayer) and adapter_name in m.lora_magnitude_vector for m in model.modules())
            if config.magnitude_only_modules and not config.magnitude_only_ranks:
                raise ValueError(f"Magnitude-only modules {config.magnitude_only_modules} not found in the base model.")
            # PEFT 0.20 overlooks this in a second adapter
            if not found and config.target_modules != DUMMY_TARGET_MODULES:
                raise ValueError(f"Target modules {config.target_modules} not found in the base model.")
            layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, DoraLayer)]
            merge_checks.note_other_names(model, layers)
            reports = [layer._outputs.report for _, layer in layers if layer._outputs.report is not None]
            report = reports[0] if reports else Report()
            for _, layer in layers:  # what is said once per model
                layer.notices, layer._outputs.report = layers[0][1].notices, report
        except Exception as error:
            undo()
            if isinstance(error, ValueError) and "not found in the base model" in str(error):
                names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if layer_class(m) is not None})
                raise type(error)(
                    f"{error} Modules of {type(model).__name__} that can be adapted are named {', '.join(names[:20])}; "
                    "target_modules='all-linear' takes every linear layer but the output layer."
                ) from error
            raise

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and peft_config.magnitude_only_modules:
            peft_config.target_modules = set(self.target_module_mapping.get(model_config["model_type"], ()))
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.layer_replication:
            replicate_layers(model, peft_config.layer_replication)
        if peft_config.magnitude_only_modules == "all-linear":
            resolved: Any = _maybe_include_all_linear_layers(_for_magnitude_only(peft_config), model)
            peft_config.magnitude_only_modules = resolved.target_modules
        peft_config.magnitude_only_ranks.clear()

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        if found or not peft_config.magnitude_only_modules:
            return found
        return check_target_module_exists(_for_magnitude_only(peft_config), key) or found

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type in _MAMBA_TYPES and target_name in _MAMBA_MODULES:
            raise ValueError(
                f"Module '{target_name}' is incompatible with Mamba-based models (model_type='{model_type}'), which "
                "use its weight without calling it. Remove it from target_modules, or add it to exclude_modules."
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        pattern = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        r = peft_config.rank_pattern.get(pattern, peft_config.r)
        pattern = get_pattern_key(peft_config.alpha_pattern.keys(), current_key)
        lora_alpha = peft_config.alpha_pattern.get(pattern, peft_config.lora_alpha)
        magnitude_only = bool(
            peft_config.magnitude_only_modules
            and check_target_module_exists(_for_magnitude_only(peft_config), current_key)
        )
        if magnitude_only:
            base = target.get_base_layer() if isinstance(target, DoraLayer) else target
            r = getattr(base, "groups", 1)  # the smallest rank; plain PEFT learns it from the exact rank_pattern entry
            peft_config.magnitude_only_ranks[_exactly(current_key)] = r
        options: dict[str, Any] = {
            "r": r,
            "lora_alpha": lora_alpha,
            "config": peft_config,
            "magnitude_only": magnitude_only,
        }
        if isinstance(target, DoraLayer):
            target.update_layer(adapter_name, **options)
            return
        new_module: Any = self._create_layer(target, adapter_name, parent, current_key, options)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an additional adapter is trained only once it is activated
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_layer(
        target: nn.Module, adapter_name: str, parent: nn.Module, key: str, options: dict[str, Any]
    ) -> DoraLayer:
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"DoRA cannot adapt module '{key}': nn.MultiheadAttention uses its weight without calling it, so the "
                "adapter would never run. Leave it out with exclude_modules."
            )
        cls = layer_class(target)
        if cls is None:
            raise ValueError(
                f"Target module {target} (module '{key}') is not supported. Currently, only the following modules are "
                "supported: `torch.nn.Linear`, `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, "
                "`torch.nn.Conv3d`, `transformers.pytorch_utils.Conv1D` and quantised linear layers. Change "
                "target_modules or leave the module out with exclude_modules."
            )
        return cls(target, adapter_name, name=key, **options)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own copies child.weight onto an unwrapped module, which fails for a TrainableTokensWrapper (0.20, 0.21)
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        # asked for by name: every adapter tensor in the dtype of its base layer, magnitudes included
        for layer in self.model.modules():
            if isinstance(layer, DoraLayer) and adapter_name in layer.lora_magnitude_vector:
                dtype = layer.factor_parameters(adapter_name)[0].dtype
                magnitude: Any = layer.lora_magnitude_vector[adapter_name]
                magnitude.cast(dtype)

    # ---- mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one per sample, to the layers (inference only)."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, DoraLayer)]
        known = {name for layer in layers for name in layer.lora_magnitude_vector}
        unknown = sorted(set(adapter_names) - known - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or 1
        model: Any = self.model
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
        # beam search repeats every sample for the decoder, while an encoder still sees each once
        once = set() if encoder is None or encoder is model else set(encoder.modules())
        repeated = [name for name in adapter_names for _ in range(beams)]
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, (DoraLayer, AuxiliaryTrainingWrapper)):
                    names = list(adapter_names) if module in once else repeated
                    hook = module.register_forward_pre_hook(partial(_pass_names, names=names), with_kwargs=True)
                    stack.callback(hook.remove)
            yield

    # ---- merging and combining

    def _check_merge_allowed(self) -> None:
        with warnings.catch_warnings():
            # PEFT warns that merging a tied table leads to complications; here it is untied, and said so
            warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
            super()._check_merge_allowed()

    def _prepare_merge(self, adapter_names: list[str] | None, for_good: bool) -> list[DoraLayer]:
        """The layers that merging these adapters will write to.

        Raises:
            NotImplementedError: One of them cannot be merged. Nothing has been touched.
        """
        self._check_merge_allowed()
        layers = [(n, m) for n, m in self.model.named_modules() if isinstance(m, DoraLayer)]
        merge_checks.note_other_names(self.model, layers)
        concerned = [layer for _, layer in layers if layer.adapters_to_merge(adapter_names)]
        for layer in concerned:
            layer.check_mergeable(brought_in=False)
        owners = merge_checks.owners_of_weights(self.model)
        for layer in concerned:
            shared = owners.get(id(layer.original_weight()), [])
            if len(shared) > 1 and not layer.merged:
                merge_checks.warn_of_untying(layer, shared, for_good)
        return concerned

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, offload_original: bool = False
    ) -> None:
        """Write the adapters into the base weights; `unmerge_adapter` restores the originals bit for bit.

        Costs a second copy of every adapted weight until then, on the same device or, with `offload_original`, on the
        CPU. `merge_and_unload` keeps none.

        Args:
            adapter_names: The active ones if None.
            safe_merge: Refuse a result that is not finite.
            offload_original: Keep the originals on the CPU (dense base weights only). A weight that another module
                uses as well stays where it is.

        Raises:
            NotImplementedError: A module's weight cannot be written.
            ValueError: With `safe_merge`, a merged weight is not finite. The model is as before in either case.
        """
        self._prepare_merge(adapter_names, for_good=False)
        owners = merge_checks.owners_of_weights(self.model)
        done: list[tuple[DoraLayer, list[str]]] = []
        try:
            for module in self.model.modules():
                if not isinstance(module, DoraLayer):
                    continue
                before = list(module.merged_adapters)
                alone = len(owners.get(id(module.original_weight()), ())) < 2
                with onload_layer(module):
                    module.merge(safe_merge, adapter_names, offload_original=offload_original and alone)
                done.append((module, before))
        except BaseException:
            for module, before in reversed(done):
                if module.merged_adapters != before:
                    with onload_layer(module):
                        module.unmerge()
                        module.merge(adapter_names=before)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._prepare_merge(adapter_names, for_good=True)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
        **unsupported: Any,
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
        if combination_type not in ("cat", "svd") or any(v is not None for v in unsupported.values()):
            what = combination_type if combination_type not in ("cat", "svd") else ", ".join(unsupported)
            raise ValueError(
                f"add_weighted_adapter supports combination_type 'cat' and 'svd' for DoRA, found {what!r}: m * (W0 + s "
                "B A) / ||W0 + s B A|| is not linear in A and B, so methods that combine these alone give another "
                "weight than the weighted sum."
            )
        missing = [name for name in adapters if name not in self.peft_config]
        if missing or not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"Expected existing adapters ({', '.join(self.peft_config)}) and as many weights, found "
                f"adapters={adapters}, weights={weights}."
            )
        wrappers = [m for m in self.modules() if isinstance(m, ModulesToSaveWrapper)]
        if any(sum(name in w.modules_to_save for name in adapters) > 1 for w in wrappers):
            raise ValueError("Cannot add weighted adapters if they target the same module with modules_to_save.")
        parts: dict[str, list[tuple[str, float]]] = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, DoraLayer):
                present = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.lora_magnitude_vector]
                if present and layer.get_base_layer().__class__.__name__.startswith("Conv") and not layer._mergeable():
                    raise ValueError(f"Adapters of module '{name}' cannot be combined: {layer._merge_obstacle()}")
                parts[name] = present
        parts = {name: present for name, present in parts.items() if present}
        largest = max(self.model.get_submodule(n).r[a] for n, present in parts.items() for a, _ in present)
        ranks = {}
        for name, present in parts.items():
            total = sum(self.model.get_submodule(name).r[a] for a, _ in present)
            ranks[name] = total if combination_type == "cat" else min(svd_rank or largest, total)
        config: Any = copy.deepcopy(self.peft_config[adapters[0]])
        # alpha / r = 1 (or alpha / sqrt(r)): the scalings are folded into B
        alphas = {name: math.sqrt(r) if config.use_rslora else r for name, r in ranks.items()}
        config.r, config.lora_alpha = max(ranks.values()), max(alphas.values())
        config.rank_pattern = {_exactly(name): r for name, r in ranks.items()}
        config.alpha_pattern = {_exactly(name): alpha for name, alpha in alphas.items()}
        # a regular expression is matched in full, a list of names by their ends
        config.target_modules, config.magnitude_only_modules = "|".join(map(re.escape, parts)), None
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = config.layer_replication = None
        config.init_lora_weights, config.inference_mode = False, True
        with ExitStack() as rollback:
            rollback.callback(self.peft_config.pop, adapter_name)
            rollback.callback(Undo(self.model, adapter_name))
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
            for name, present in parts.items():
                _combine_layer(self.model.get_submodule(name), adapter_name, present, ranks[name])
            rollback.pop_all()

    def hotswap_adapter(self, path: str, adapter_name: str = "default", torch_device: str | None = None) -> None:
        """Replace an adapter's tensors and scalings by those of another checkpoint, in place.

        Raises:
            ValueError: The adapter is merged, or the checkpoint targets other modules, has other ranks, or other
                options that change the output; the old adapter is then untouched.
        """
        config = DoraConfig.from_pretrained(path)
        old = self.peft_config[adapter_name]
        for name in ("use_rslora", "lora_dropout", "dropout_mode", "magnitude_only_modules"):
            if getattr(old, name) != getattr(config, name):
                raise ValueError(
                    f"Cannot hot-swap adapter '{adapter_name}' with '{path}': {name} is {getattr(old, name)!r} and "
                    f"{getattr(config, name)!r}. Load it under another name."
                )
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, DoraLayer) and adapter_name in m.r}
        if any(adapter_name in layer.merged_adapters for layer in layers.values()):
            raise ValueError(
                f"Cannot hot-swap adapter '{adapter_name}' while it is merged. Call unmerge_adapter() first."
            )
        with ExitStack() as rollback:
            rollback.callback(Undo(self.model, adapter_name))
            for layer in layers.values():
                for numbers in (layer.lora_alpha, layer.scaling):
                    rollback.callback(numbers.__setitem__, adapter_name, numbers[adapter_name])
            for name, layer in layers.items():  # the conversion of grouped convolutions depends on the new scaling
                pattern = get_pattern_key(list(config.alpha_pattern), name)
                layer.lora_alpha[adapter_name] = config.alpha_pattern.get(pattern, config.lora_alpha)
                layer.set_scale(adapter_name, 1.0)
            tensors = save_and_load.load_peft_weights(path, device=torch_device)
            tensors = from_checkpoint(self.model, adapter_name, tensors, config)
            tensors = self._remap_keys(self.model, adapter_name, tensors)
            current = {n: p for n, p in self.model.named_parameters() if _is_of(n, adapter_name)}
            different = sorted(set(current) ^ set(tensors)) or sorted(
                k for k in current if current[k].shape != tensors[k].shape
            )
            if different:
                raise ValueError(
                    f"Cannot hot-swap adapter '{adapter_name}' with '{path}': expected the same tensors of the same "
                    f"shapes, found a difference in {', '.join(different[:3])}{' ...' * (len(different) > 3)}. Load it "
                    "under another name."
                )
            rollback.pop_all()
        with torch.no_grad():
            for key, parameter in current.items():
                parameter.copy_(tensors[key])
        for layer in layers.values():
            layer.detach_norm[adapter_name] = config.detach_norm
        config.inference_mode = old.inference_mode
        self.peft_config[adapter_name] = config

    # ---- checkpoints (PEFT 0.21 calls these; _registry.py does for 0.20)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        return to_checkpoint(model, adapter_name, tensors, config)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors = from_checkpoint(model, adapter_name, state_dict, config)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)

    @staticmethod
    def _remap_keys(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Checkpoint keys to parameter names of `model`."""
        names = {}
        for name, _ in model.named_parameters():
            bare = name.removesuffix(f".{adapter_name}").replace(f".{adapter_name}.weight", ".weight")
            names[bare] = names[f"base_model.model.{bare}"] = name
        return {names.get(key, key): value for key, value in tensors.items()}

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: Any, path: str, output_state_dict: dict[str, Tensor], kwargs: Any
    ) -> dict[str, Tensor]:
        """PiSSA and its kin moved s B0 A0 out of the base weight: W_res + s B A = W0 + s (B A - B0 A0), so the factors
        of the unmutated base are [A; A0] and [B, -B0], and the magnitude stays as it is."""
        return _subtract_initial(output_state_dict, save_and_load.load_peft_weights(path, device="cpu"), peft_config)

    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, Tensor]:
        """The same for PEFT 0.20, which loads the initial adapter beside the trained one."""
        initial = save_and_load.get_peft_model_state_dict(self, adapter_name=adapter_name)
        initial = {f"base_model.{key}": value for key, value in initial.items()}
        config: Any = copy.copy(self.peft_config[adapter_name])
        # asked of this tuner, the record has its names instead of the base model's
        config.tied_rows = {name.removeprefix("model."): rows for name, rows in (config.tied_rows or {}).items()}
        return _subtract_initial(output_state_dict, initial, config)


def _subtract_initial(trained: dict[str, Tensor], initial: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    out = {}
    for key, tensor in trained.items():
        module = bare(key.rpartition(".lora_")[0])
        if "lora_" not in key or "lora_magnitude_vector" in key or _exactly(module) in config.magnitude_only_ranks:
            out[key] = tensor  # zero factors, up to entries for plain PEFT, whose rank is not doubled
            continue
        if key not in initial:
            raise ValueError(f"Expected the initial adapter to have the tensor '{key}', found {len(initial)} others.")
        start = initial[key].to(tensor)
        is_A = "lora_A" in key or "lora_embedding_A" in key
        tied = None if is_A else to_mask((config.tied_rows or {}).get(module, []), start.shape[0])
        if tied is not None:  # only the entry for plain PEFT, which could cancel the one of the trained B
            start = torch.where(tied.to(start.device).view(-1, *(1 for _ in start.shape[1:])), 0, start)
        out[key] = torch.cat([tensor, start if is_A else -start], dim=0 if is_A else 1)
    return out


def _exactly(name: str) -> str:
    """A rank_pattern or alpha_pattern key for one module alone; a bare name would match the ends of others too."""
    return f"^{re.escape(name)}"


class Undo:
    """Takes an adapter that could not be created or loaded out of a model, which then is as it was at construction.

    An adapter that existed already keeps its old tensors.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.model, self.adapter_name = model, adapter_name
        self.layers = {id(m): m for m in model.modules() if isinstance(m, DoraLayer)}
        self.existed = any(adapter_name in layer.lora_magnitude_vector for layer in self.layers.values())
        self.trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        old = ((n, p) for n, p in model.named_parameters() if self.existed and _is_of(n, adapter_name))
        self.tensors = [(parameter, parameter.detach().clone()) for _, parameter in old]
        self.norms = [(layer, layer._norms.get(adapter_name)) for layer in self.layers.values() if self.existed]

    def __call__(self) -> None:
        parent: Any
        for parent in list(self.model.modules()):
            for name, child in [] if isinstance(parent, DoraLayer) else list(parent.named_children()):
                if isinstance(child, DoraLayer) and id(child) not in self.layers:
                    setattr(parent, name, child.get_base_layer())
                elif isinstance(child, DoraLayer) and not self.existed and self.adapter_name in child.r:
                    child.delete_adapter(self.adapter_name)
        for parameter, requires_grad in self.trainable:
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for parameter, tensor in self.tensors:
                parameter.copy_(tensor)
        for layer, norm in self.norms:
            if norm is not None:
                layer._norms[self.adapter_name] = norm  # which rows are tied; its key no longer fits


def _is_of(parameter_name: str, adapter: str) -> bool:
    rest = parameter_name.rpartition(".lora_")[2]
    return rest != parameter_name and (f".{adapter}." in rest or rest.endswith(f".{adapter}"))


def _pass_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _for_magnitude_only(config: DoraConfig) -> DoraConfig:
    """The same config with the magnitude-only modules as its targets."""
    view = copy.copy(config)
    view.target_modules = config.magnitude_only_modules
    return view


@torch.no_grad()
def _combine_layer(layer: Any, adapter_name: str, present: list[tuple[str, float]], rank: int) -> None:
    """Fill `adapter_name` of one layer with the weighted sum of other adapters of it."""
    weight = layer.base_weight()
    parts = []
    for name, _ in present:
        lora_A, lora_B = (t.detach().to(weight.device, weight.dtype) for t in layer.factors(name))
        c = layer.scale(name).to(weight.device, weight.dtype)
        parts.append((lora_A, lora_B, float(layer.scaling[name]), c))
    lora_A, lora_B, k = merging.combine(parts, [w for _, w in present])
    if rank < lora_A.shape[0]:
        lora_A, lora_B = merging.truncate(lora_A, lora_B, rank)
    new_A, new_B = layer.factor_parameters(adapter_name)
    new_A.zero_()
    new_B.zero_()
    # truncation gives fewer than `rank` rows where the layer is smaller than that
    new_A.flatten(1)[: lora_A.shape[0]].copy_(lora_A)
    new_B.flatten(1)[:, : lora_B.shape[1]].copy_(lora_B)
    # a row that is tied in all parts has c = 1 in all, so in the sum too
    masks = [norms.weight_norm(layer, name).tied for name, _ in present]
    known = [mask for mask in masks if mask is not None]
    tied = torch.stack(known).all(0) if len(known) == len(masks) else None
    tied = tied if tied is not None and bool(tied.any()) else None
    layer._norms[adapter_name] = norms.Norm(tied=tied, settled=True)
    magnitude = layer.magnitude(adapter_name)
    norm: Any = norms.weight_norm(layer, adapter_name)
    magnitude.view(-1).copy_(k * norm.value)
