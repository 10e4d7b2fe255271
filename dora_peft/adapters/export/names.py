"""Which keys of a checkpoint's files a parameter of the model is made of."""

from __future__ import annotations

from torch import Tensor, nn

from ..formats import Checkpoint, UnreadableError


class Names:
    """Parameters of a model, as its files hold them.

    Args:
        checkpoint: The files.
        model: The model on the meta device, without adapters.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        self.checkpoint = checkpoint
        self._groups = _tied(model)

    def keys(self, parameter: str) -> tuple[str, ...]:
        """The keys of the tensors that a parameter ("model.norm.weight") is made of.

        Raises:
            UnreadableError: There are none, or there is a choice.
        """
        entries = self.checkpoint.entries
        for name in [parameter, *(other for other in self._groups.get(parameter, ()) if other != parameter)]:
            if name in entries:
                return (name,)
            found = [key for key in entries if name.endswith(f".{key}") or key.endswith(f".{name}")]
            if len(found) == 1:
                return (found[0],)
        raise UnreadableError(
            f"'{self.checkpoint.name}' is another base: its files have no '{parameter}', which the adapter changes. "
            "Name the base that it was trained on."
        )

    def shared(self, parameter: str) -> list[str]:
        """The other parameters that are the same tensor, tied."""
        return [name for name in self._groups.get(parameter, ()) if name != parameter]

    def read(self, parameter: str) -> Tensor:
        """The parameter as the model holds it, in the files' dtype."""
        (key,) = self.keys(parameter)
        return self.checkpoint.tensor(key)

    def write(self, parameter: str, tensor: Tensor) -> dict[str, Tensor]:
        """A new value of the parameter as the files hold it, by key.

        For one that is tied to another parameter, whose name the files have, the key is its own: see `untied`.
        """
        (key,) = self.keys(parameter)
        return {key: tensor}


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """By the name of a parameter, all names of the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() if len(names) > 1 for name in names}
