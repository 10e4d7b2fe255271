"""The options of the fine-tune and memory benchmark scripts; options.py reads them from YAML and command line.

Names and meanings are those of transformers' `TrainingArguments` and PEFT's configurations. Every value is checked for
type and range when the configuration is built, so that a mistake shows before a model is loaded.
"""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from transformers import SchedulerType

METHODS = ("dora", "lora", "peft_dora", "full")


def about(
    *,
    help: str,
    choices: Sequence[Any] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> dict[str, Any]:
    """The metadata of an option: its help text and its range."""
    return {"help": help, "choices": choices, "at_least": at_least, "above": above, "below": below}


@dataclasses.dataclass(kw_only=True)
class FinetuneConfig:
    """Everything that `finetune_llama.py` and `benchmark_memory.py` read from a YAML file or the command line.

    Raises:
        ValueError: for a value of the wrong type or out of range, or options that contradict each other.
    """

    # Model
    model_name_or_path: str = field(metadata=about(help="Hub id or local folder of the base model"))
    gguf_file: str | None = field(
        default=None, metadata=about(help="file name inside the model folder, for a model in GGUF format")
    )
    dtype: str = field(
        default="auto",
        metadata=about(choices=("auto", "float32", "bfloat16", "float16"), help="dtype of the base weights"),
    )

    # Method
    method: str = field(
        default="dora", metadata=about(choices=METHODS, help="what is trained; `full` trains every parameter")
    )
    r: int = field(default=16, metadata=about(at_least=1, help="rank of the adapter"))
    lora_alpha: float = field(
        default=32, metadata=about(above=0, help="scaling numerator: the update is multiplied by lora_alpha / r")
    )
    lora_dropout: float = field(default=0.0, metadata=about(at_least=0, below=1, help="dropout before A"))
    target_modules: list[str] | str = field(
        default="all-linear", metadata=about(help="module names, a regular expression, or all-linear")
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata=about(help="modules to leave out of target_modules")
    )
    magnitude_only_modules: list[str] | str | None = field(
        default=None, metadata=about(help="dora: modules that train the magnitude alone")
    )
    detach_norm: bool = field(
        default=True, metadata=about(help="dora: treat the norm as a constant in backward (section 4.3 of the paper)")
    )
    dropout_mode: str = field(
        default="branch", metadata=about(choices=("branch", "paper"), help="dora: what dropout acts on")
    )
    use_rslora: bool = field(default=False, metadata=about(help="scale by lora_alpha / sqrt(r)"))
    init_lora_weights: bool | str = field(
        default=True, metadata=about(help="initialisation of A and B, as in PEFT's LoraConfig")
    )

    # Data
    dataset: str = field(
        metadata=about(help="Hub id, a .json, .jsonl, .csv or .parquet file, or a folder of such files")
    )
    dataset_config: str | None = field(default=None, metadata=about(help="configuration name of a Hub data set"))
    train_split: str = field(
        default="train", metadata=about(help="split to train on; a file has the one split `train`")
    )
    eval_dataset: str | None = field(
        default=None, metadata=about(help="data to evaluate on, given like dataset; its split is eval_split")
    )
    eval_split: str = field(default="train", metadata=about(help="split of eval_dataset to evaluate on"))
    eval_size: int = field(
        default=0, metadata=about(at_least=0, help="without eval_dataset: records to hold out of the training data")
    )
    format: str = field(
        default="auto",
        metadata=about(
            choices=("auto", "instruction", "prompt_completion", "chat"),
            help="records of instruction/input/output, prompt/completion or messages; auto looks at the first one",
        ),
    )
    max_length: int = field(
        default=512, metadata=about(at_least=8, help="longest sequence in tokens; longer ones are cut")
    )
    packing: bool = field(
        default=False, metadata=about(help="fill blocks of max_length with several whole records instead of padding")
    )
    max_train_samples: int | None = field(
        default=None, metadata=about(at_least=1, help="use only the first so many training records")
    )
    max_eval_samples: int | None = field(
        default=None, metadata=about(at_least=1, help="use only the first so many evaluation records")
    )

    # Training
    output_dir: str = field(metadata=about(help="folder for checkpoints, adapter, loss curve and evaluation results"))
    learning_rate: float = field(default=2e-4, metadata=about(above=0, help="peak learning rate"))
    lr_magnitude: float | None = field(
        default=None, metadata=about(above=0, help="dora: learning rate of the magnitudes, if it differs")
    )
    weight_decay: float = field(
        default=0.0, metadata=about(at_least=0, help="AdamW's weight decay; magnitudes are never decayed")
    )
    per_device_train_batch_size: int = field(
        default=8, metadata=about(at_least=1, help="sequences per device and forward pass")
    )
    per_device_eval_batch_size: int = field(
        default=8, metadata=about(at_least=1, help="sequences per device in evaluation")
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata=about(at_least=1, help="forward passes per optimizer step")
    )
    num_train_epochs: float = field(default=3.0, metadata=about(above=0, help="passes over the training data"))
    max_steps: int = field(
        default=-1, metadata=about(at_least=-1, help="optimizer steps; -1 leaves it to num_train_epochs")
    )
    warmup_steps: float = field(
        default=0, metadata=about(at_least=0, help="steps of linear warm-up; below 1 a share of all steps")
    )
    lr_scheduler_type: str = field(
        default="linear", metadata=about(choices=tuple(s.value for s in SchedulerType), help="schedule")
    )
    max_grad_norm: float = field(default=1.0, metadata=about(at_least=0, help="gradient clipping; 0 turns it off"))
    gradient_checkpointing: bool = field(
        default=False, metadata=about(help="recompute activations in backward instead of keeping them")
    )
    bf16: bool = field(default=False, metadata=about(help="bfloat16 autocast"))
    use_cpu: bool = field(default=False, metadata=about(help="stay on the CPU if there is an accelerator"))
    seed: int = field(default=42, metadata=about(at_least=0, help="seed of initialisation, data order and dropout"))

    # Logging, evaluation, saving
    logging_steps: int = field(
        default=10, metadata=about(at_least=1, help="optimizer steps between two points of the loss curve")
    )
    eval_steps: int | None = field(
        default=None, metadata=about(at_least=1, help="optimizer steps between evaluations; null: only at the end")
    )
    save_steps: int | None = field(
        default=None, metadata=about(at_least=1, help="optimizer steps between checkpoints; null: none")
    )
    save_total_limit: int | None = field(default=2, metadata=about(at_least=1, help="checkpoints to keep; null: all"))
    resume_from_checkpoint: bool | str = field(
        default=False,
        metadata=about(
            help="true: continue from the newest whole checkpoint in output_dir, if there is one; or a path to one"
        ),
    )
    merge: bool = field(
        default=False, metadata=about(help="also save the base model with the adapter merged in, to output_dir/merged")
    )
    push_to_hub: bool = field(
        default=False, metadata=about(help="upload adapter, tokenizer, loss curve and results at the end")
    )
    hub_model_id: str | None = field(default=None, metadata=about(help="repository to push to, as owner/name"))
    report_to: list[str] | str = field(default="none", metadata=about(help="tracker such as tensorboard or wandb"))

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for option in dataclasses.fields(self):
            value = convert(option.name, getattr(self, option.name), hints[option.name])
            check_range(option, value)
            setattr(self, option.name, value)
        for name in ("target_modules", "exclude_modules", "magnitude_only_modules"):
            modules = getattr(self, name)
            if isinstance(modules, str) and modules.isidentifier():
                # PEFT reads a string as a regular expression for the whole path, which a bare name never matches.
                setattr(self, name, [modules])
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.max_steps == 0:
            raise ValueError("max_steps: expected -1 or at least 1, found 0.")
        if self.eval_dataset is not None and self.eval_size:
            raise ValueError("eval_dataset and eval_size exclude each other: give one of them.")
        if self.eval_steps is not None and self.eval_dataset is None and not self.eval_size:
            raise ValueError("eval_steps needs evaluation data: give eval_dataset or eval_size.")
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub needs hub_model_id, the repository to push to, as owner/name.")
        if self.dtype == "float16" and self.bf16:
            raise ValueError("dtype float16 and bf16 exclude each other: use dtype bfloat16 or float32 with bf16.")
        if self.dtype == "float16" and self.method == "full":
            raise ValueError("method full cannot train float16 weights, small updates vanish: use dtype float32.")
        if Path(self.output_dir).is_file():
            raise ValueError(f"output_dir: expected a folder, found the file {self.output_dir}.")
        folder = Path(self.model_name_or_path)
        if self.gguf_file is not None and folder.is_dir() and not (folder / self.gguf_file).is_file():
            raise ValueError(f"gguf_file: no file {self.gguf_file} in the folder {folder}.")

    def unused_options(self) -> list[str]:
        """Names of options that were changed from their default but mean nothing to `method`."""
        adapter = ["r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora"]
        adapter += ["init_lora_weights", "merge"]
        dora = ["magnitude_only_modules", "detach_norm", "dropout_mode", "lr_magnitude"]
        names = {"dora": [], "lora": dora, "peft_dora": dora, "full": adapter + dora}[self.method]
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def convert(name: str, value: Any, hint: Any) -> Any:
    """Check `value` against the type `hint` and return it in that type.

    Raises:
        ValueError: naming the field, the expected type and what was found.
    """
    kinds = kinds_of(hint)
    if isinstance(value, str) and str not in kinds and float in kinds:
        # YAML 1.1 reads 1e-4, without a dot, as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    for kind in kinds:
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind == list[str] and isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return value
        if kind is str and isinstance(value, str) and value:
            return value
        if kind in (bool, types.NoneType) and isinstance(value, kind):
            return value
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
    words |= {list[str]: "a list of texts", types.NoneType: "null"}
    raise ValueError(f"{name}: expected {' or '.join(words[kind] for kind in kinds)}, found {value!r}.")


def check_range(option: dataclasses.Field, value: Any) -> None:
    """Raise a ValueError if `value` is outside the choices or the bounds that `option` declares."""
    choices, at_least, above, below = (option.metadata[key] for key in ("choices", "at_least", "above", "below"))
    if choices is not None and value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"{option.name}: expected one of {', '.join(choices)}, found {value!r}.{hint}")
    if value is None:
        return
    if at_least is not None and value < at_least:
        raise ValueError(f"{option.name}: expected at least {at_least}, found {value}.")
    if above is not None and value <= above:
        raise ValueError(f"{option.name}: expected more than {above}, found {value}.")
    if below is not None and value >= below:
        raise ValueError(f"{option.name}: expected less than {below}, found {value}.")


def check_known(names: Sequence[str], where: str) -> None:
    """Raise a ValueError for the first of `names` that is no option, with the closest one that is."""
    known = [option.name for option in dataclasses.fields(FinetuneConfig)]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "`--help` lists the fields."
            raise ValueError(f"{where}: unknown field {name!r}, {hint}")
