"""DoraConfig: PEFT's LoRA options with their own names and meanings, and the few that are DoRA's."""

from __future__ import annotations

import copy
import json
import os
import warnings
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from peft import LoraConfig, PeftConfig
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.utils import CONFIG_NAME, PeftType

from ._field_types import check_types, describe, fits
from ._files import atomic_write_text, saving
from ._own_entries import LORA_FIELDS, Names, entries_of, pack, read_packed
from ._refused_fields import IGNORED, REFUSED, REFUSED_INIT, refuse_foreign_fields
from ._row_ranges import Ranges, checked_record


@read_packed
@refuse_foreign_fields
@dataclass
class DoraConfig(PeftConfig):
    """Configuration of a DoRA adapter: W' = m * (W0 + s B A) / ||W0 + s B A||.

    The options that PEFT's `LoraConfig` has keep their names, defaults and meanings. A `LoraConfig` field without
    meaning for DoRA is refused with the reason.

    Args:
        r: Rank of the direction's change.
        target_modules: Names, a regular expression, or "all-linear". None takes PEFT's default for the architecture.
        exclude_modules: Names or a regular expression of modules to leave alone.
        lora_alpha: s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        lora_dropout: Dropout probability on the input of the low-rank branch (see `dropout_mode`).
        fan_in_fan_out: Accepted for compatibility; the layout follows from the layer's type.
        bias: "none", "all" or "lora_only" (the biases of the adapted layers): which biases are trained.
        use_rslora: Rank-stabilised scaling.
        modules_to_save: Further modules that are trained in full and saved with the adapter.
        init_lora_weights: True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "corda", "loftq",
            "lora_ga": PEFT's own initialisations. "eva" and "mica" are refused.
        layers_to_transform, layers_pattern: Restrict a list of target modules to some layers.
        rank_pattern, alpha_pattern: Rank and alpha per module name or expression.
        trainable_token_indices: Embedding rows that are trained in full.
        loftq_config, corda_config, lora_ga_config: For the initialisation of that name.
        layer_replication: Layers to repeat, as in PEFT.
        detach_norm: Treat ||W0 + s B A|| as a constant of the backward pass (sec. 4.3 of the paper). False gives the
            full gradient, to reproduce the paper's comparison.
        dropout_mode: "branch" drops the low-rank branch only, as LoRA does: y = c (x W0^T + s drop(x) A^T B^T) + b.
            "paper" drops the base product of (c - 1) as well, as the paper's code and PEFT's `use_dora` do, at the cost
            of a second base product: y = x W0^T + (c - 1) drop(x) W0^T + c s drop(x) A^T B^T + b. The expectation is
            the same.
        magnitude_only_modules: Names, a regular expression, or "all-linear": modules that train m alone (Table 6 of the
            paper). They take precedence over `target_modules` and are saved as rank-1 zero factors, which plain PEFT
            reads.
        magnitude_key: How `save_pretrained` spells the magnitude's key. "weight" ("...lora_magnitude_vector.weight") is
            read by PEFT and by transformers' `load_adapter`; "peft" is PEFT's own spelling without ".weight", whose
            magnitudes transformers 5.23 drops. Both are read here.

    Raises:
        ValueError: A field has no meaning for DoRA, or its value is out of range.

    Example:
        >>> model = get_peft_model(model, DoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    """

    r: int = field(default=8, metadata={"help": "Rank of the direction's change"})
    target_modules: Names = field(
        default=None, metadata={"help": "Module names, a regular expression, or 'all-linear'"}
    )
    exclude_modules: Names = field(default=None, metadata={"help": "Module names or a regular expression to leave out"})
    lora_alpha: float = field(default=8, metadata={"help": "scaling = lora_alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the low-rank branch"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Accepted for compatibility with LoraConfig"})
    bias: Literal["none", "all", "lora_only"] = field(default="none", metadata={"help": "Which biases are trained"})
    use_rslora: bool = field(default=False, metadata={"help": "scaling = lora_alpha / sqrt(r)"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full"})
    init_lora_weights: bool | str = field(default=True, metadata={"help": "One of PEFT's LoRA initialisations"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layers' list"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Rank per module"})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "lora_alpha per module"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Embedding rows trained in full"}
    )
    loftq_config: object = field(default_factory=dict, metadata={"help": "For init_lora_weights='loftq'"})
    corda_config: object = field(default=None, metadata={"help": "For init_lora_weights='corda'"})
    lora_ga_config: object = field(default=None, metadata={"help": "For init_lora_weights='lora_ga'"})
    layer_replication: list[tuple[int, int]] | None = field(default=None, metadata={"help": "Layers to repeat"})
    detach_norm: bool = field(default=True, metadata={"help": "Treat the norm as a constant of the backward pass"})
    dropout_mode: Literal["branch", "paper"] = field(default="branch", metadata={"help": "What dropout acts on"})
    magnitude_only_modules: Names = field(default=None, metadata={"help": "Modules that train the magnitude alone"})
    magnitude_key: Literal["weight", "peft"] = field(default="weight", metadata={"help": "Spelling of saved keys"})

    # read unconditionally by PEFT and TRL; not fields, because DoRA cannot have them
    target_parameters = None
    use_dora = True

    def __post_init__(self) -> None:
        self.rank_pattern = {} if self.rank_pattern is None else self.rank_pattern
        self.alpha_pattern = {} if self.alpha_pattern is None else self.alpha_pattern
        # before anybody reads them; those left out are named by the messages of `_check`
        check_types(self, skip=("peft_type", "r", "rank_pattern", "bias", "dropout_mode", "magnitude_key"))
        super().__post_init__()
        self.peft_type = PeftType.DORA  # type: ignore[attr-defined]
        for name in ("target_modules", "exclude_modules", "magnitude_only_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        if not fits(self.rank_pattern, dict[str, object]):
            raise ValueError(f"rank_pattern must be {describe(dict[str, int])}, found {self.rank_pattern!r}")
        for name, value in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if not fits(value, int) or value <= 0:
                raise ValueError(
                    f"`r` should be a positive integer value but the value passed is {value!r} ({name}), "
                    "take for example r=8"
                )
        alphas = {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        for name, alpha in {"lora_alpha": self.lora_alpha, **alphas}.items():
            if alpha < 0:
                raise ValueError(f"{name} must not be negative, found {alpha!r}; take for example 2 * r")
        for name in ("loftq_config", "corda_config", "lora_ga_config"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict) and not is_dataclass(value):
                raise ValueError(f"{name} must be a dictionary or PEFT's class for it, found {value!r}")
        only = self.magnitude_only_modules
        if self.layers_to_transform is not None and isinstance(only, str) and only != "all-linear":
            raise ValueError(
                "`layers_to_transform` cannot be used when `magnitude_only_modules` is a str; give a list of names."
            )
        choices = {
            "bias": ("none", "all", "lora_only"),
            "dropout_mode": ("branch", "paper"),
            "magnitude_key": ("weight", "peft"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, found {value!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), found {self.lora_dropout!r}")
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights.lower() in REFUSED_INIT:
            reason = REFUSED_INIT[self.init_lora_weights.lower()]
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} is not available for DoRA: {reason}.")
        # PEFT's own checks of the shared fields, and its defaults for the sub-configs.
        checked = self.to_lora_config()
        for name in ("loftq_config", "corda_config", "lora_ga_config"):
            setattr(self, name, _as_sub_config(name, getattr(checked, name)))

    @property
    def init_weights(self) -> bool | str:
        """Another name of `init_lora_weights`, which PEFT sets when it rewrites a PiSSA or OLoRA adapter as LoRA."""
        return self.init_lora_weights

    @init_weights.setter
    def init_weights(self, value: bool | str) -> None:
        self.init_lora_weights = value

    def to_lora_config(self, **overrides: Any) -> LoraConfig:
        """The fields that PEFT's LoraConfig shares, as one; `use_dora` is left off: PEFT creates the factors only."""
        names = LORA_FIELDS.keys() - {"peft_type", "auto_mapping", "peft_version"}
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name in names}
        return LoraConfig(**{**shared, **overrides})

    def to_peft_dict(self) -> dict[str, Any]:
        """What `adapter_config.json` holds: a LoraConfig with `use_dora` that plain PEFT reads without a warning.

        Our own fields, and those that had to be changed for plain PEFT, are kept under auto_mapping["dora_peft"].
        `LoraConfig(**...)` and `DoraConfig(**...)` both take it, the latter to an equal config.
        """
        return copy.deepcopy(pack(self))

    def to_dict(self) -> dict[str, Any]:
        """`to_peft_dict()`: diffusers, which stores a config beside the weights, reads it back as a LoraConfig."""
        return self.to_peft_dict()

    @property
    def magnitude_only_ranks(self) -> dict[str, int]:
        """Rank patterns (exact names) of the magnitude-only modules that were found in the model."""
        return self.__dict__.setdefault("_magnitude_only_ranks", {})

    @property
    def tied_rows(self) -> dict[str, Ranges] | None:
        """Rows whose magnitude follows their norm, {module: [[start, stop], ...]}, as of the last saving or loading.

        None if that is not known: the adapter has not been saved yet, or its folder is not ours. See norms/ties.py.
        """
        return self.__dict__.get("_tied_rows")

    @tied_rows.setter
    def tied_rows(self, record: dict[str, Ranges] | None) -> None:
        self.__dict__["_tied_rows"] = None if record is None else checked_record(record, "tied_rows")

    @property
    def filled_rows(self) -> dict[str, Ranges] | None:
        """Tied rows in which the saved B has an entry for plain PEFT, which loading takes out; in the same form."""
        return self.__dict__.get("_filled_rows")

    @filled_rows.setter
    def filled_rows(self, record: dict[str, Ranges] | None) -> None:
        self.__dict__["_filled_rows"] = None if record is None else checked_record(record, "filled_rows")

    @property
    def base_quantization(self) -> dict[str, object] | None:
        """How the base was quantised when the adapter was saved: what its quantization_config says; None if not."""
        return self.__dict__.get("_base_quantization")

    @base_quantization.setter
    def base_quantization(self, record: dict[str, object] | None) -> None:
        self.__dict__["_base_quantization"] = record if isinstance(record, dict) else None

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: dict[str, str] | None) -> None:
        """Write `adapter_config.json`, in one rename.

        Raises:
            NotSavedError: An OSError: the disk is full or read-only. The old file, if there is one, is as it was.
            ValueError: `save_directory` is a file.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Expected a directory to save the adapter config in, found the file {save_directory}")
        out = self.to_peft_dict()
        out["auto_mapping"] = {**(kwargs.pop("auto_mapping_dict", None) or {}), **out["auto_mapping"]}
        path = os.path.join(save_directory, CONFIG_NAME)
        # sorted at the top only: PEFT takes the first rank_pattern entry that matches, so their order counts
        with saving("the adapter config", str(save_directory)):
            atomic_write_text(path, json.dumps(dict(sorted(out.items())), indent=2))

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> DoraConfig:
        """From the entries of an `adapter_config.json`: one written here, or by PEFT with `use_dora=True`."""
        peft_type = kwargs.pop("peft_type", None)
        if peft_type not in ("LORA", "DORA", None):
            raise ValueError(f"Expected a DoRA adapter, found one of type {peft_type}. Load it with plain PEFT.")
        if peft_type == "LORA" and not kwargs.get("use_dora", False):
            raise ValueError(
                "Expected a DoRA adapter, found plain LoRA (use_dora is false in its adapter_config.json). Load it "
                "with peft.LoraConfig, or train a DoRA adapter."
            )
        entries_of(kwargs.get("auto_mapping"), "auto_mapping")
        entries_of(kwargs.get("rank_pattern"), "rank_pattern")
        known = {f.name for f in fields(cls)} | REFUSED.keys() | IGNORED.keys()
        # a field that PEFT added later, at a value that switches it off, changes nothing
        unknown = sorted(k for k, v in kwargs.items() if k not in known and v not in (None, False, {}, []))
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class DoraConfig, these are ignored.", stacklevel=2
            )
        return cls(**{name: value for name, value in kwargs.items() if name in known})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> DoraConfig:
        """Load from a folder or Hub repository, marked as ours or written by PEFT with `use_dora=True`.

        Raises:
            ValueError: There is no adapter_config.json, or it belongs to an adapter that is not DoRA.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except ValueError as error:
            folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
            raise ValueError(f"Cannot load a DoRA adapter config from '{folder}': {error}") from error


def _as_sub_config(name: str, value: object) -> object:
    """PEFT's class for a sub-config that was read from a file; PEFT 0.20 leaves it a dictionary."""
    kind = {"corda_config": CordaConfig, "lora_ga_config": LoraGAConfig}.get(name)
    if kind is None or not isinstance(value, dict):
        return value
    try:
        return kind(**value)
    except TypeError as error:
        raise ValueError(f"{name} must have entries of PEFT's {kind.__name__}, found {value!r} ({error}).") from error
