"""W0 of a base model, one module at a time, from its files or from a model in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

from ... import reference
from ...bases import BaseWeight, Dense, base_weight
from ...bases.inspection import FLOATS
from .adapter import Adapter, Module, UnreadableError
from .checkpoint import Checkpoint, Entry

# Rows of W0 + s B A that are made at a time, in fp64.
BLOCK_BYTES = 16 * 2**20


class Base:
    """The modules of a base model and their weights.

    Args:
        source: What `Checkpoint` takes, one of these, or a model. A model may be quantised; files may not.
        device: Where weights from files are brought.
        progress: Called with the path of each module whose weight is read.

    Raises:
        UnreadableError: There are no weights, or they are damaged.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Checkpoint | nn.Module,
        device: torch.device | str = "cpu",
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.device = _usable(device)
        self._progress = progress
        self._turned = False
        self.config: dict[str, object] = {}
        self.files: Checkpoint | None = None
        if isinstance(source, nn.Module):
            self.name = str(getattr(getattr(source, "config", None), "_name_or_path", "") or type(source).__name__)
            self._model: nn.Module | None = source
            config = getattr(source, "config", None)
            self.config = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
            return
        self.files = source if isinstance(source, Checkpoint) else Checkpoint(source)
        self.name, self.config = self.files.name, self.files.config
        self._model = skeleton(self.config)

    def paths(self) -> list[str]:
        """The paths of all modules that hold a weight, in the model's order."""
        if self._model is not None:
            return [name for name, module in self._model.named_modules() if hasattr(module, "weight")]
        return [key.removesuffix(".weight") for key in self._stored if key.endswith(".weight")]

    @property
    def _stored(self) -> dict[str, Entry]:
        return {} if self.files is None else self.files.entries

    def weight(self, path: str, module: Module) -> BaseWeight:
        """W0 of one module as [out, in] rows.

        Raises:
            UnreadableError: The base has no such module, another shape there, or no floats.
        """
        if self._progress is not None:
            self._progress(path)
        seam = self._seam(path, module)
        found, expected = (seam.out_features, seam.in_features), (module.out_features, module.in_features)
        if found != expected:
            raise UnreadableError(
                f"'{self.name}' is another base: the adapter's module '{path}' is for a weight of "
                f"{expected[0]} x {expected[1]}, and its weight is {found[0]} x {found[1]}."
            )
        return seam

    def check(self, adapter: Adapter) -> None:
        """Compare the shapes of all modules with the adapter's.

        Raises:
            UnreadableError: One does not fit; the first is named.
        """
        for path, module in adapter.modules.items():
            if module.lora_B.shape[1] != module.rank:
                # PEFT's A of a grouped convolution is for the inputs of all groups
                continue
            if self._model is None:
                self._check_stored(path, module)
                square = module.in_features == module.out_features
                turned = self._stored[self._key(path)].shape == (module.in_features, module.out_features)
                self._turned |= turned and not square and not module.embedding
            else:
                layer = self._layer(path)
                weight = getattr(layer, "weight", None)
                if isinstance(weight, Tensor) and weight.dtype in FLOATS:
                    self._check_numbers(path, module, weight.numel())

    def norms(self, path: str, module: Module) -> tuple[Tensor, Tensor]:
        """||W0|| and ||W0 + s B A|| per output row, each [out] in fp64, from one reading of the weight."""
        weight = self.weight(path, module)
        lora_A, lora_B = (factor.to(weight.device, torch.float64) for factor in module.matrices())
        before = torch.empty(module.out_features, dtype=torch.float64, device=weight.device)
        composed = torch.empty_like(before)
        step = max(1, BLOCK_BYTES // (8 * module.in_features))
        for start in range(0, module.out_features, step):
            stop = min(start + step, module.out_features)
            with weight.lend(stop - start) as memory:
                rows = weight.block(start, stop, memory).double()
                torch.linalg.vector_norm(rows, dim=1, out=before[start:stop])
                composed[start:stop] = reference.weight_norm(rows, lora_A, lora_B[start:stop], module.scaling)
        return before.cpu(), composed.cpu()

    def row_norms(self, path: str, module: Module, with_change: bool = True) -> Tensor:
        """||W0 + s B A|| per output row, or ||W0|| without its change: [out] in fp64."""
        return self.norms(path, module)[with_change]

    def column_norms(self, path: str, module: Module) -> Tensor:
        """||W0 + s B A|| per column of the matrix: [in] in fp64."""
        weight = self.weight(path, module)
        lora_A, lora_B = (factor.to(weight.device, torch.float64) for factor in module.matrices())
        squared = torch.zeros(module.in_features, dtype=torch.float64, device=weight.device)
        for start, stop, rows in weight.blocks():
            squared += torch.addmm(rows.double(), lora_B[start:stop], lora_A, alpha=module.scaling).square().sum(0)
        return squared.sqrt().cpu()

    def _seam(self, path: str, module: Module) -> BaseWeight:
        if self._model is None:
            self._check_stored(path, module)
            tensor = self._tensor(path)
            # of a square weight only the others say whether it is stored the other way round
            square = module.in_features == module.out_features
            turned = self._turned if square else len(tensor) == module.in_features
            return Dense(tensor, Tensor.t if module.embedding or turned else lambda w: w.flatten(1))
        layer = self._layer(path)
        stored = getattr(layer, "weight", None)
        return base_weight(layer, path, self._tensor(path) if isinstance(stored, Tensor) and stored.is_meta else None)

    def _layer(self, path: str) -> nn.Module:
        assert self._model is not None
        try:
            return self._model.get_submodule(path)
        except AttributeError:
            # an adapter of the model without its head
            found = [name for name, _ in self._model.named_modules() if name.endswith(f".{path}")]
            if len(found) == 1:
                return self._model.get_submodule(found[0])
            raise self._absent(path) from None

    def _absent(self, path: str) -> UnreadableError:
        return UnreadableError(
            f"'{self.name}' is another base: it has no module '{path}', which the adapter changes. Name the base that "
            "it was trained on."
        )

    def _tensor(self, path: str) -> Tensor:
        key = self._key(path)
        assert self.files is not None
        tensor = self.files.tensor(key).to(self.device)
        if tensor.dtype not in FLOATS:
            raise UnreadableError(
                f"'{self.name}' is quantised: '{key}' is {tensor.dtype}. Name the base before quantisation, or pass "
                "the loaded model to the function of Python."
            )
        return tensor

    def _key(self, path: str) -> str:
        """The name of a module's weight in the files, which may leave out the first parts of its path, or have more."""
        for name in (path, *self._tied_to(path)):
            wanted = f"{name}.weight"
            if wanted in self._stored:
                return wanted
            found = [key for key in self._stored if wanted.endswith(f".{key}") or key.endswith(f".{wanted}")]
            if len(found) == 1:
                return found[0]
        raise self._absent(path)

    def _tied_to(self, path: str) -> list[str]:
        """The other modules that share this one's weight, which files hold once."""
        if self._model is None:
            return []
        own = getattr(self._layer(path), "weight", None)
        return [name for name, other in self._model.named_modules() if getattr(other, "weight", None) is own]

    def _check_stored(self, path: str, module: Module) -> None:
        shape = self._stored[self._key(path)].shape
        self._check_numbers(path, module, int(torch.Size(shape).numel()), shape)

    def _check_numbers(self, path: str, module: Module, found: int, shape: tuple[int, ...] = ()) -> None:
        if found != module.out_features * module.in_features:
            raise UnreadableError(
                f"'{self.name}' is another base: the adapter's module '{path}' is for a weight of "
                f"{module.out_features} x {module.in_features}, and its weight has {list(shape) or found} numbers."
            )


def _usable(device: torch.device | str) -> torch.device:
    """A device that tensors can be brought to.

    Raises:
        UnreadableError: There is none of this name.
    """
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).strip().splitlines()
        raise UnreadableError(f"--device {str(device)[:40]}: {said[0] if said else type(error).__name__}") from error
    if found.type == "meta":
        raise UnreadableError("--device meta holds no numbers: expected cpu or a GPU.")
    return found


def skeleton(config: dict[str, object]) -> nn.Module | None:
    """The base model without weights, which says what kind each module is; None if transformers has no such model."""
    names = config.get("architectures")
    kind = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)) or kind.config_class is None:
        return None
    try:
        own = kind.config_class.from_dict(json.loads(json.dumps(config)))
        with torch.device("meta"):
            model: nn.Module = kind(own)
        model.tie_weights()  # type: ignore[operator]
    except Exception as error:
        # of as many kinds as there are models and entries
        said = str(error).strip().splitlines()
        raise UnreadableError(
            f"The base's config.json makes no {kind.__name__}: {type(error).__name__}: {said[0] if said else ''}. "
            "Restore the file."
        ) from error
    return model
