"""The options of the fine-tune and memory benchmark scripts: a YAML file, command-line overrides, a grouped --help.

The options are the fields of three dataclasses, `ModelArguments`, `DataArguments` and transformers' own
`TrainingArguments`, which `HfArgumentParser` turns into flags. A YAML file holds the same names; its values are read as
if they stood on the command line, so that both are checked alike.
"""

import argparse
import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from finetune.arguments import ADAPTER_OPTIONS, TRAINING_DEFAULTS, DataArguments, ModelArguments, training_values

USUAL_TRAINING = (
    "output_dir", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_steps", "max_grad_norm", "bf16", "fp16", "activation_checkpointing", "gradient_checkpointing", "torch_compile",
    "deepspeed", "use_cpu", "seed", "logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
    "save_total_limit", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id",
)  # fmt: skip
GROUPS = ("model", "adapter", "data", "training", "training: all other options of transformers' TrainingArguments")
# Our own words if TrainingArguments' do not say what happens here.
HELP = {
    "output_dir": "folder for checkpoints, adapter, loss curve and evaluation results",
    "resume_from_checkpoint": "true: continue from the newest whole checkpoint in output_dir, if any; or a path",
    "eval_strategy": "no, steps or epoch; steps if eval_steps is given; at the end there is one anyway",
    "save_strategy": "checkpoints: no, steps, epoch or best; steps if save_steps is given",
    "push_to_hub": "upload adapter, tokenizer, loss curve and results at the end",
    "hub_model_id": "repository to push to, as owner/name; default: the name of output_dir",
    "report_to": "trackers such as tensorboard or wandb, several words for several",
    "use_cpu": "stay on the CPU if there is an accelerator",
}


class OptionParser(HfArgumentParser):
    """HfArgumentParser with the options in groups, `null` for None, and errors of one line that name what was meant.

    Values that were not given leave no attribute behind, so that the command line can be laid over a file.
    """

    def __init__(self, description: str | None) -> None:
        classes = (ModelArguments, DataArguments, TrainingArguments)
        self.hints: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        self.group_of: dict[str, str] = {}
        for kind in classes:
            self.hints |= typing.get_type_hints(kind)
            for option in dataclasses.fields(kind):
                has_factory = option.default_factory is not dataclasses.MISSING
                self.defaults[option.name] = None if has_factory else option.default
        self.defaults |= {**TRAINING_DEFAULTS, "output_dir": dataclasses.MISSING}
        self.group_of |= {option.name: "model" for option in dataclasses.fields(ModelArguments)}
        self.group_of |= dict.fromkeys(ADAPTER_OPTIONS, "adapter") | {"method": "adapter"}
        self.group_of |= {option.name: "data" for option in dataclasses.fields(DataArguments)}
        self.group_of |= dict.fromkeys(USUAL_TRAINING, "training")
        self.groups: dict[str, Any] = {}
        super().__init__(
            classes,
            usage="%(prog)s [CONFIG.yaml] [--option value ...]",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            exit_on_error=False,
        )

    def add_argument(self, *flags: Any, **kwargs: Any) -> Any:
        """Put an option of the dataclasses into its group; other flags are argparse's own."""
        name = flags[0].removeprefix("--")
        if name not in self.hints:
            if kwargs.get("action") == "store_false":
                # the twin --no_NAME of a switch that is on by default
                kwargs |= {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
            return super().add_argument(*flags, **kwargs)
        if not self.groups:
            self.groups = {title: self.add_argument_group(title) for title in GROUPS}
        kinds = kinds_of(self.hints[name])
        convert, choices = kwargs.get("type", str), kwargs.pop("choices", None)
        if choices is None and convert not in (int, float) and bool in kinds and str not in kinds:
            # The switch alone means true, also for those that are neither on nor off by default.
            kwargs |= {"nargs": "?", "const": True}
        if takes_list(kinds):
            kwargs["nargs"] = "+"
        if name == "resume_from_checkpoint":
            kwargs |= {"nargs": "?", "const": "true"}
        kwargs |= {
            "dest": name,
            "type": reader(convert, None if choices is None else [str(choice) for choice in choices]),
            "metavar": placeholder(convert, kinds, choices),
            "default": argparse.SUPPRESS,
            "required": False,
        }
        default = self.defaults[name]
        text = HELP.get(name, kwargs.get("help") or "")
        if default is dataclasses.MISSING:
            text += " (required)"
        elif default is not None and name not in HELP:
            text += f" (default: {getattr(default, 'value', default)})".replace("%", "%%")
        group = self.groups[self.group_of.get(name, GROUPS[-1])]
        group.add_argument(flags[0], **kwargs | {"help": " ".join(text.split())})
        if flags[1:]:
            # --learning-rate for --learning_rate
            group.add_argument(*flags[1:], **kwargs | {"help": argparse.SUPPRESS})
        return None

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    def read(self, words: Sequence[str], source: str) -> tuple[dict[str, Any], list[str]]:
        """The values of the flags among `words`, and the words that belong to none."""
        try:
            namespace, bare = self.parse_known_args(words)
        except argparse.ArgumentError as error:
            self.error(f"{source}: {(error.argument_name or '').lstrip('-')}: {error.message}")
        for word in bare:
            if word.startswith("--"):
                self.check_known(word[2:].split("=")[0], source)
        return vars(namespace), bare

    def check_known(self, name: str, source: str) -> None:
        """End with an error if there is no such option, and say which one is like it."""
        if name not in self.hints:
            close = difflib.get_close_matches(name, self.hints, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists the options."
            self.error(f"{source}: unknown field {name!r}, {hint}")

    def parse(
        self, argv: Sequence[str] | None = None
    ) -> tuple[ModelArguments, DataArguments, TrainingArguments, argparse.Namespace]:
        """Read the YAML file and the flags of a command line; a mistake ends the process with one line and status 2.

        Args:
            argv: the words after the program's name; None takes them from `sys.argv`.

        Returns:
            The three dataclasses, and a namespace with the script's own flags.
        """
        given, bare = self.read(sys.argv[1:] if argv is None else list(argv), "command line")
        if bare[1:] or (bare and not bare[0].endswith((".yaml", ".yml"))):
            self.error(f"command line: unexpected {bare[-1]!r}; overrides are written --field value.")
        values = self.read_yaml(bare[0]) if bare else {}
        values |= given
        own = argparse.Namespace(**{name: value for name, value in values.items() if name not in self.hints})
        options = {name: settle(value, self.hints[name]) for name, value in values.items() if name in self.hints}
        # null is None if the option can be, and otherwise as if it were not there
        options = {n: v for n, v in options.items() if v is not None or types.NoneType in kinds_of(self.hints[n])}
        required = [name for name, default in self.defaults.items() if default is dataclasses.MISSING]
        missing = [name for name in required if options.get(name) is None]
        if missing:
            where = bare[0] if bare else "command line"
            self.error(f"{where}: missing {', '.join(missing)}; add it there or pass --{missing[0]} VALUE.")
        ours = {option.name for kind in (ModelArguments, DataArguments) for option in dataclasses.fields(kind)}
        try:
            training = training_values({name: value for name, value in options.items() if name not in ours})
            model, data, args = self.parse_dict({n: v for n, v in options.items() if n in ours} | training)
        except Exception as error:
            # TrainingArguments checks its fields as it is made, and has no class of its own for what it finds wrong.
            self.error(str(error))
        return model, data, args, own

    def read_yaml(self, path: str) -> dict[str, Any]:
        """The values of a YAML file, through the flags of their names."""
        if not Path(path).is_file():
            self.error(f"{path}: no such configuration file; configs/ holds examples.")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"{path}: not valid YAML: {error}")
        if not isinstance(values, dict):
            self.error(f"{path}: expected lines of `field: value`, found {type(values).__name__}.")
        words = []
        for name, value in values.items():
            self.check_known(str(name), path)
            kinds = kinds_of(self.hints[name])
            if isinstance(value, list) and not takes_list(kinds):
                self.error(f"{path}: {name}: expected one value, found a list.")
            if isinstance(value, dict) and not takes_mapping(kinds):
                self.error(f"{path}: {name}: expected one value, found a mapping.")
            if value == []:
                self.error(f"{path}: {name}: expected at least one value, found an empty list.")
            words += [f"--{name}", *map(as_word, value)] if isinstance(value, list) else [f"--{name}={as_word(value)}"]
        return self.read(words, path)[0]


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def takes_list(kinds: Sequence[Any]) -> bool:
    return any(typing.get_origin(kind) is list for kind in kinds)


def takes_mapping(kinds: Sequence[Any]) -> bool:
    return any((typing.get_origin(kind) or kind) is dict or dataclasses.is_dataclass(kind) for kind in kinds)


def settle(value: Any, hint: Any) -> Any:
    """A list of one word is that word if the option may be a text, and one of null is None."""
    if not isinstance(value, list) or len(value) != 1:
        return value
    return value[0] if value[0] is None or str in kinds_of(hint) else value


def as_word(value: Any) -> str:
    """A value of a YAML file as one would write it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def reader(convert: Callable[[str], Any], choices: Sequence[str] | None) -> Callable[[str], Any]:
    """A type for argparse: `convert` with `null` for None, and errors that say what was expected."""
    expected = {int: "a whole number", float: "a finite number"}.get(convert, getattr(convert, "__name__", "a mapping"))

    def read(text: str) -> Any:
        if text == "null":
            return None
        if choices is not None and text not in choices:
            close = difflib.get_close_matches(text, choices, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, found {text!r}.{hint}")
        try:
            value = convert(**json.loads(text)) if takes_mapping([convert]) else convert(text)
        except (ValueError, TypeError):
            value = math.nan
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}.")
        return value

    return read


def placeholder(convert: Callable[[str], Any], kinds: Sequence[Any], choices: Sequence[Any] | None) -> str:
    """What stands for an option's value in the help."""
    if choices is not None and len(choices) <= 5:
        return "{" + ",".join(map(str, choices)) + "}"
    if bool in kinds and str not in kinds:
        return "BOOL"
    return {int: "INT", float: "FLOAT"}.get(convert, "NAME" if choices else "TEXT")


def build_parser(description: str | None) -> OptionParser:
    """A parser of the three dataclasses' fields, to which a script adds its own flags."""
    return OptionParser(description)
