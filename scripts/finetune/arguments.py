"""What a fine-tune run is told beside transformers' `TrainingArguments`: the model with its adapter, and the data.

Both are plain dataclasses for `HfArgumentParser`; options.py reads them, and `TrainingArguments`, from YAML and command
line. Names are those of PEFT's configurations and of TRL.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

# What differs from the defaults of TrainingArguments.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "logging_steps": 10,
    "logging_first_step": True,
    "save_strategy": "no",
    "save_total_limit": 2,
    "hub_strategy": "end",
    "report_to": "none",
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,
}
# What may be as small as its number, or must be larger or smaller than it.
AT_LEAST = {
    "r": 1, "lora_dropout": 0, "max_length": 8, "eval_size": 0, "max_train_samples": 1, "max_eval_samples": 1,
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "weight_decay": 0, "warmup_steps": 0, "max_grad_norm": 0, "seed": 0, "save_total_limit": 1, "adam_beta1": 0,
    "adam_beta2": 0, "adam_epsilon": 0, "dataloader_num_workers": 0, "neftune_noise_alpha": 0,
    "eval_accumulation_steps": 1,
}  # fmt: skip
ABOVE = {
    "lora_alpha": 0, "lr_magnitude": 0, "learning_rate": 0, "num_train_epochs": 0,
    "logging_steps": 0, "eval_steps": 0, "save_steps": 0,
}  # fmt: skip
BELOW = {"lora_dropout": 1, "adam_beta1": 1, "adam_beta2": 1}
# A mapping or none; TrainingArguments takes any text for one.
MAPPINGS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
# Options of the adapter, and those of them that only DoRA has.
DORA_OPTIONS = ("magnitude_only_modules", "detach_norm", "dropout_mode", "lr_magnitude")
ADAPTER_OPTIONS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "init_lora_weights", "merge",
    *DORA_OPTIONS,
)  # fmt: skip


@dataclass(kw_only=True)
class ModelArguments:
    """The base model and what is trained of it.

    Raises:
        ValueError: for a value out of range, or options that contradict each other.
    """

    model_name_or_path: str = field(metadata={"help": "Hub id or local folder of the base model"})
    gguf_file: str | None = field(
        default=None, metadata={"help": "file name inside the model folder, for a model in GGUF format"}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the base weights"}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "quantise the base to nf4 by bitsandbytes: QDoRA, or QLoRA with --method lora"}
    )

    method: Literal["dora", "lora", "peft_dora", "full"] = field(
        default="dora", metadata={"help": "what is trained; full trains every parameter"}
    )
    r: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: float = field(
        default=32, metadata={"help": "scaling numerator: the update is multiplied by lora_alpha / r"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before A"})
    target_modules: list[str] | str = field(
        default="all-linear", metadata={"help": "module names, a regular expression, or all-linear"}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "modules to leave out of target_modules"}
    )
    magnitude_only_modules: list[str] | str | None = field(
        default=None, metadata={"help": "dora: modules that train the magnitude alone"}
    )
    detach_norm: bool = field(
        default=True, metadata={"help": "dora: treat the norm as a constant in backward (section 4.3 of the paper)"}
    )
    dropout_mode: Literal["branch", "paper"] = field(default="branch", metadata={"help": "dora: what dropout acts on"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by lora_alpha / sqrt(r)"})
    init_lora_weights: str = field(
        default="true", metadata={"help": "initialisation of A and B: true, false, or a name as in PEFT's LoraConfig"}
    )
    lr_magnitude: float | None = field(
        default=None, metadata={"help": "dora: learning rate of the magnitudes, if it differs"}
    )
    merge: bool = field(
        default=False, metadata={"help": "also save the model with the adapter merged in, to output_dir/merged"}
    )

    def __post_init__(self) -> None:
        check_ranges(vars(self))
        for name in ("target_modules", "exclude_modules", "magnitude_only_modules"):
            modules = getattr(self, name)
            if isinstance(modules, str) and modules.isidentifier():
                # PEFT reads a string as a regular expression for the whole path, which a bare name never matches.
                setattr(self, name, [modules])
            elif isinstance(modules, str):
                check_pattern(name, modules)
        if self.method == "full" and self.dtype == "float16":
            raise ValueError("method full cannot train float16 weights, small updates vanish: use dtype float32.")
        if self.method == "full" and self.load_in_4bit:
            raise ValueError("method full cannot train 4-bit weights: use an adapter, such as --method dora.")
        folder = Path(self.model_name_or_path)
        if self.gguf_file is not None and folder.is_dir() and not (folder / self.gguf_file).is_file():
            raise ValueError(f"gguf_file: no file {self.gguf_file} in the folder {folder}.")

    def unused_options(self) -> list[str]:
        """Names of options that were changed from their default but mean nothing to `method`."""
        names = {"dora": (), "lora": DORA_OPTIONS, "peft_dora": DORA_OPTIONS, "full": ADAPTER_OPTIONS}[self.method]
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]


@dataclass(kw_only=True)
class DataArguments:
    """The records to train and to evaluate on.

    Raises:
        ValueError: for a value out of range, or options that contradict each other.
    """

    dataset: str = field(metadata={"help": "Hub id, a .json, .jsonl, .csv or .parquet file, or a folder of such files"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration name of a Hub data set"})
    train_split: str = field(default="train", metadata={"help": "split to train on; a file has the one split train"})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "data to evaluate on, given like dataset; its split is eval_split"}
    )
    eval_split: str = field(default="train", metadata={"help": "split of eval_dataset to evaluate on"})
    eval_size: int = field(
        default=0, metadata={"help": "without eval_dataset: records to hold out of the training data"}
    )
    format: Literal["auto", "instruction", "prompt_completion", "chat"] = field(
        default="auto",
        metadata={
            "help": "records of instruction/input/output, prompt/completion (texts or lists of messages), or messages; "
            "auto looks at the first one"
        },
    )
    max_length: int = field(default=512, metadata={"help": "longest sequence in tokens; longer ones are cut"})
    packing: bool = field(
        default=False, metadata={"help": "fill blocks of max_length with several whole records instead of padding"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "use only the first so many training records"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "use only the first so many evaluation records"}
    )

    def __post_init__(self) -> None:
        check_ranges(vars(self))
        if self.eval_dataset is not None and self.eval_size:
            raise ValueError("eval_dataset and eval_size exclude each other: give one of them.")


def training_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `TrainingArguments` as a run needs them: those given, our defaults, and what follows from both.

    Raises:
        ValueError: for a value out of range.
    """
    check_ranges(given)
    if given.get("max_steps") == 0:
        raise ValueError("max_steps: expected -1 or at least 1, found 0.")
    for name in MAPPINGS:
        if isinstance(given.get(name), str) and not given[name].startswith("{"):
            raise ValueError(f'{name}: expected a mapping such as {{"name": 1}}, found {given[name]!r}.')
    has_accelerator = torch.accelerator.is_available()
    values = {**TRAINING_DEFAULTS, "dataloader_pin_memory": has_accelerator, **given}
    values["report_to"] = values["report_to"] or "none"
    # transformers takes the words for names of sharding strategies, and means the switch.
    if str(values.get("fsdp")).lower() in ("true", "false"):
        values["fsdp"] = True if str(values["fsdp"]).lower() == "true" else None
    # Without this, processes started on a machine that has no accelerator would not find each other; DeepSpeed's have
    # a way of their own, and with it would train without DeepSpeed.
    values["use_cpu"] = values.get("use_cpu", False) or not (has_accelerator or values.get("deepspeed"))
    for kind in ("eval", "save"):
        if f"{kind}_strategy" not in given and given.get(f"{kind}_steps") is not None:
            values[f"{kind}_strategy"] = "steps"
    # transformers renamed the two in the course of version 5 and warns about the older names.
    known = {option.name for option in dataclasses.fields(TrainingArguments)}
    kind = "activation" if "activation_checkpointing" in known else "gradient"
    for suffix in ("checkpointing", "checkpointing_kwargs"):
        old = values.pop(f"gradient_{suffix}", None)
        if old is not None:
            values.setdefault(f"{kind}_{suffix}", old)
    if values.get(f"{kind}_checkpointing"):
        values.setdefault(f"{kind}_checkpointing_kwargs", {"use_reentrant": False})
    return values


def check_ranges(values: Mapping[str, Any]) -> None:
    """Raise a ValueError for the first number that is smaller or larger than its option can be."""
    for name, value in values.items():
        if value is None:
            continue
        if name in AT_LEAST and value < AT_LEAST[name]:
            raise ValueError(f"{name}: expected at least {AT_LEAST[name]}, found {value}.")
        if name in ABOVE and value <= ABOVE[name]:
            raise ValueError(f"{name}: expected more than {ABOVE[name]}, found {value}.")
        if name in BELOW and value >= BELOW[name]:
            raise ValueError(f"{name}: expected less than {BELOW[name]}, found {value}.")


def check_pattern(name: str, pattern: str) -> None:
    """Raise a ValueError for a regular expression that is none."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: no regular expression: {error}, found {pattern!r}.") from error
