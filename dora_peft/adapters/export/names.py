"""Which keys of a checkpoint's files a parameter of the model is made of, and the way back.

transformers renames the keys of files, and splits, joins or transposes their tensors, when it loads a model: what
Mixtral's files call `block_sparse_moe.experts.0.w1.weight` is a part of `mlp.experts.gate_up_proj`. The keys of the
files are renamed here by its own functions, so that a parameter is written under the very keys that it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..formats import Checkpoint, UnreadableError


class Converter(Protocol):
    """What is used of transformers' WeightConverter and its reverse."""

    target_patterns: list[str]

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]: ...
    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Tensor) -> None: ...
    def convert(self, layer_name: str, *, model: nn.Module, config: object) -> object: ...
    def reverse_transform(self) -> Converter: ...


@dataclass
class Group:
    """Parameters of the model and tensors of the files that are made of each other.

    Attributes:
        parameters: Their names in the model; more than one if a tensor of the files is split.
        keys: Those of the files, in the order in which transformers joins them.
    """

    parameters: list[str]
    keys: list[str] = field(default_factory=list)
    # by key, the pattern of the converter that it matches; none if nothing but names changes
    _patterns: dict[str, str] = field(default_factory=dict)
    _converter: Converter | None = None


class Names:
    """Parameters of a model, as its files hold them.

    Args:
        checkpoint: The files.
        model: The model on the meta device, without adapters.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        self.checkpoint = checkpoint
        self._model = model
        self._shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if isinstance(t, Tensor)}
        self._tied = _tied(model)
        self._renamings: list[WeightRenaming] = []
        self._converters: list[WeightConverter] = []
        if isinstance(model, PreTrainedModel):
            for transform in conversion_mapping.get_model_conversion_mapping(model):
                if isinstance(transform, WeightConverter):
                    self._converters.append(transform)
                elif isinstance(transform, WeightRenaming):
                    self._renamings.append(transform)
        self._groups: dict[str, list[Group]] = {}
        self._renamed: dict[str, str] = {}
        self._collect()

    def keys(self, parameter: str) -> tuple[str, ...]:
        """The keys of the tensors that a parameter ("model.norm.weight") is made of, or the one that it is tied to.

        Raises:
            UnreadableError: There are none, or there is a choice.
        """
        return tuple(self.group(parameter).keys)

    def group(self, parameter: str) -> Group:
        """The parameter, or one that it is tied to, and all that is made of the same tensors.

        Raises:
            UnreadableError: The files have no such tensor, or more than one.
        """
        for name in (parameter, *self.shared(parameter)):
            found = self._groups.get(name) or self._by_ending(name)
            if len(found) > 1:
                keys = " and ".join(f"'{group.keys[0]}'" for group in found[:2])
                raise UnreadableError(
                    f"'{self.checkpoint.name}' has '{name}', which the adapter changes, {len(found)} times: as {keys}. "
                    "Leave one of them in the files."
                )
            if found:
                return found[0]
        raise UnreadableError(
            f"'{self.checkpoint.name}' is another base: its files have no '{parameter}', which the adapter changes. "
            "Name the base that it was trained on."
        )

    def shared(self, parameter: str) -> list[str]:
        """The other parameters that are the same tensor, tied."""
        return [name for name in self._tied.get(parameter, ()) if name != parameter]

    def has(self, parameter: str) -> bool:
        """Whether the files hold a parameter itself, rather than one that it is tied to, or none."""
        return bool(self._groups.get(parameter) or (not self._held(parameter) and self._by_ending(parameter)))

    def read(self, parameter: str) -> Tensor:
        """The parameter as the model holds it, in the files' dtype."""
        group = self.group(parameter)
        values = self.values(group)
        held = next(name for name in (parameter, *self.shared(parameter)) if name in values)
        return values[held]

    def write(self, parameter: str, tensor: Tensor) -> dict[str, Tensor]:
        """A new value of the parameter as the files hold it, by key; the others of its group are as they were."""
        group = self.group(parameter)
        values = {} if len(group.parameters) == 1 else self.values(group)
        held = next(name for name in (parameter, *self.shared(parameter)) if name in group.parameters)
        return self.tensors(group, {**values, held: tensor})

    def values(self, group: Group) -> dict[str, Tensor]:
        """The parameters of a group, read from the files."""
        return self._forwards(group, self.checkpoint.tensor)

    def tensors(self, group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of all parameters of a group as the files hold them, by key."""
        if group._converter is None:
            (key,), (parameter,) = group.keys, group.parameters
            return {key: values[parameter]}
        back = deepcopy(group._converter).reverse_transform()
        first = ""
        for parameter in group.parameters:
            renamed, pattern = back.rename_source_key(parameter)
            first = first or renamed
            back.add_tensor(renamed, parameter, cast(str, pattern), values[parameter])
        made = _converted(back, first, self._model)
        named = {self._key_of(group, name): tensor for name, tensor in made.items()}
        if sorted(named) != sorted(group.keys):
            raise UnreadableError(self._no_way_back(group))
        return {key: named[key] for key in group.keys}

    def check(self, parameter: str) -> None:
        """See that a parameter can be read and written, without reading it.

        Raises:
            UnreadableError: It is not in the files once, or transformers knows no way back to them.
        """
        group = self.group(parameter)
        if group._converter is None:
            found, expected = self.checkpoint.entries[group.keys[0]].shape, self._shapes[parameter]
            if found != expected:
                raise UnreadableError(
                    f"'{self.checkpoint.name}' is not whole: '{parameter}' is {list(expected)} by its config.json, and "
                    f"{list(found)} in its files. Download it again."
                )
            return
        try:
            made = self.tensors(group, self._forwards(group, self._meta))
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            # each operation of transformers has its own
            raise UnreadableError(self._no_way_back(group)) from error
        if any(tuple(tensor.shape) != self.checkpoint.entries[key].shape for key, tensor in made.items()):
            raise UnreadableError(self._no_way_back(group))

    def new_key(self, parameter: str) -> str:
        """A key for a parameter that the files do not hold, since it is tied to another one.

        Raises:
            UnreadableError: transformers would not take any key for it.
        """
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        names = [parameter, self._reversed(parameter), parameter.removeprefix(prefix), prefix + parameter]
        held = next((name for name in self.shared(parameter) if self._groups.get(name)), None)
        if held is not None and self._reversed(held) == self._groups[held][0].keys[0] != held:
            # the files have names of their own
            names.insert(0, self._reversed(parameter))
        for name in names:
            if name not in self.checkpoint.entries and self._rename(name)[0] == parameter:
                return name
        raise UnreadableError(
            f"'{parameter}' is tied to '{held}' in '{self.checkpoint.name}', and no key of a file would untie it. "
            "Merge it with merge_and_unload."
        )

    def path_in_files(self, path: str) -> str:
        """What the files call a module, whose weight may be stored in parts.

        Raises:
            UnreadableError: They have no such module, or more than one.
        """
        found = {
            key.removesuffix(renamed.removeprefix(path)): None
            for key, renamed in self._renamed.items()
            if renamed.startswith(f"{path}.") and key.endswith(renamed.removeprefix(path))
        }
        if len(found) != 1:
            raise UnreadableError(f"'{self.checkpoint.name}' has {len(found)} modules '{path}' in its files, not one.")
        return next(iter(found))

    def module_of(self, path: str) -> str:
        """The model's module that a path in the files is of."""
        for key, renamed in self._renamed.items():
            if key.startswith(f"{path}."):
                return renamed.removesuffix(key.removeprefix(path))
        raise UnreadableError(f"'{self.checkpoint.name}' has no module '{path}' in its files.")

    def _collect(self) -> None:
        """Put every key of the files to the parameter that it is loaded into."""
        by_name: dict[str, Group] = {}
        patterns = {pattern: one for one in self._converters for pattern in one.source_patterns}
        for key in sorted(self.checkpoint.entries, key=dot_natural_key):
            name, pattern = self._rename(key)
            self._renamed[key] = name
            if pattern is None:
                self._groups.setdefault(name, []).append(Group([name], [key]))
                continue
            if name not in by_name:
                by_name[name] = Group([name], _converter=cast(Converter, patterns[pattern]))
            by_name[name].keys.append(key)
            by_name[name]._patterns[key] = pattern
        for group in by_name.values():
            converter = cast(Converter, group._converter)
            if len(converter.target_patterns) > 1 or "*" in converter.target_patterns[0]:
                group.parameters = list(self._forwards(group, self._meta))
            for parameter in group.parameters:
                self._groups.setdefault(parameter, []).append(group)

    def _rename(self, key: str) -> tuple[str, str | None]:
        """The parameter of a key, and the converter's pattern that it matches."""
        prefix, known = getattr(self._model, "base_model_prefix", None) or None, _Known(self._model, self._shapes)
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, known)
        if name not in self._shapes and pattern is None and key in self._shapes:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        return name, pattern

    def _reversed(self, parameter: str) -> str:
        """The key that transformers would write for a parameter that is only renamed."""
        if not isinstance(self._model, PreTrainedModel):
            return parameter
        own = conversion_mapping.get_model_conversion_mapping(self._model, add_legacy=False)
        name = parameter
        for renaming in (one for one in reversed(own) if isinstance(one, WeightRenaming)):
            name = renaming.reverse_transform().rename_source_key(name)[0]
        return name

    def _by_ending(self, parameter: str) -> list[Group]:
        """What is under a key with other first parts, in files that transformers would not load by themselves."""
        if self._held(parameter):
            return []
        keys = [k for k in self.checkpoint.entries if parameter.endswith(f".{k}") or k.endswith(f".{parameter}")]
        return [Group([parameter], [key]) for key in keys if self._renamed[key] not in self._shapes]

    def _held(self, parameter: str) -> bool:
        return any(name in self._groups for name in (parameter, *self.shared(parameter)))

    def _forwards(self, group: Group, tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters made of the files' tensors."""
        if group._converter is None:
            return {group.parameters[0]: tensor(group.keys[0])}
        converter = deepcopy(group._converter)
        name = self._rename(group.keys[0])[0]
        for key in group.keys:
            converter.add_tensor(name, key, group._patterns[key], tensor(key))
        return _converted(converter, name, self._model)

    def _meta(self, key: str) -> Tensor:
        entry = self.checkpoint.entries[key]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def _key_of(self, group: Group, name: str) -> str:
        """The files' key of a tensor that the way back has made under the name before the files' renamings."""
        for key in group.keys:
            before = key
            for renaming in self._renamings:
                before = renaming.rename_source_key(before)[0]
            if name == before or name.endswith(f".{before}") or before.endswith(f".{name}"):
                return key
        return name

    def _no_way_back(self, group: Group) -> str:
        return (
            f"'{group.parameters[0]}' is made of {len(group.keys)} tensors of '{self.checkpoint.name}' "
            f"('{group.keys[0]}' ...) in a way that this version of transformers cannot take back. Merge it with "
            "merge_and_unload."
        )


class _Known(dict[str, object]):
    """The model's parameters by name, to which its modules' paths with any last name are added: parts of a quantised
    weight, which the model on the meta device does not have."""

    def __init__(self, model: nn.Module, names: Mapping[str, object]) -> None:
        super().__init__(names)
        self._paths = {name.rpartition(".")[0] for name in names} - {""}

    def get(self, name: str, default: object = None) -> object:  # type: ignore[override]
        path = name.rpartition(".")[0]
        return name if name in self or path in self._paths or path.rpartition(".")[0] in self._paths else default


def _converted(converter: Converter, name: str, model: nn.Module) -> dict[str, Tensor]:
    made = converter.convert(name, model=model, config=model.config)
    # transformers 5.0 returns errors as well
    found = cast("dict[str, Tensor | list[Tensor]]", made[0] if isinstance(made, tuple) else made)
    return {key: value[0] if isinstance(value, list) else value for key, value in found.items()}


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """By the name of a parameter, all names of the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() if len(names) > 1 for name in names}
