"""A base model that is one .gguf, read as transformers reads it: floats, by the names of Hugging Face's model.

What it gives of a tensor equals, bit for bit, the parameter of AutoModelForCausalLM.from_pretrained(folder,
gguf_file=...) in fp32: an adapter trained over that has the norms of these rows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from ..formats import Checkpoint, UnreadableError
from ..formats.base import skeleton
from ..formats.checkpoint import Entry
from .codes.gguf_file import GgufFile, Stored

SUFFIX = ".gguf"
# Their norms have weights w, used as 1 + w, and llama.cpp's files hold 1 + w.
_NORMS_FROM_ONE = ("gemma2", "gemma3")


class GgufCheckpoint(Checkpoint):
    """A base model in a .gguf, whose tensors are dequantised one at a time.

    Args:
        source: The file.

    Attributes:
        file: What lies where in it.
        config: As transformers reads it from the file, with quant_method "gguf".
        entries: Parameters of Hugging Face's model that the file has, in its order of tensors, all fp32.

    Raises:
        UnreadableError: There is no such file, or neither transformers nor `GgufFile` can read it.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        path = Path(source)
        if not path.is_file():
            raise UnreadableError(f"There is no file '{source}': expected a .gguf of a whole model.")
        self.name, self.folder, self.metadata = str(source), path.parent, {}
        self.file = GgufFile(path)
        self.config = _config_of(path)
        model = skeleton(self.config)
        assert model is not None
        self._stored: dict[str, tuple[Stored, bool]] = {}
        self.entries: dict[str, Entry] = {}
        for tensor, key, turned in _matched(self.file, model):
            shape = tensor.shape[::-1] if turned else tensor.shape
            self._stored[key] = tensor, turned
            self.entries[key] = Entry(path.name, shape, torch.float32)

    def tensor(self, key: str) -> Tensor:
        """One parameter in the model's layout and order of rows, fp32, on the CPU."""
        tensor, turned = self._stored[key]
        found = self.file.in_models_order(tensor.name, self.file.numbers(tensor, self.file.data(tensor)))
        if self.file.architecture in _NORMS_FROM_ONE and "norm.weight" in tensor.name:
            found = found - 1
        return found.t().contiguous() if turned else found

    def kind(self, key: str) -> str:
        """The type in which the file holds a parameter, "Q4_0"."""
        return self._stored[key][0].kind


def checkpoint_of(source: str | os.PathLike[str]) -> Checkpoint:
    """A base model's files: a .gguf by its name, or safetensors."""
    return GgufCheckpoint(source) if is_gguf(source) else Checkpoint(source)


def is_gguf(source: str | os.PathLike[str]) -> bool:
    """Whether a base is named as a .gguf."""
    return Path(source).suffix == SUFFIX


def loading_options(checkpoint: Checkpoint) -> dict[str, str]:
    """What transformers' `from_pretrained` takes beside the folder of a base."""
    return {"gguf_file": checkpoint.file.path.name} if isinstance(checkpoint, GgufCheckpoint) else {}


def _config_of(path: Path) -> dict[str, object]:
    """What transformers makes of the file's head, with the model's class."""
    try:
        found = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        config: dict[str, object] = json.loads(found.to_json_string(use_diff=False))
    except Exception as error:
        # of as many kinds as there are models and entries
        said = str(error).strip().splitlines()
        raise UnreadableError(
            f"transformers cannot read '{path}': {type(error).__name__}: {said[0] if said else ''} Name the base in "
            "safetensors."
        ) from error
    kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config["model_type"]))
    if not isinstance(kind, str):
        raise UnreadableError(
            f"'{path}' is a {config['model_type']}, which is no causal language model of transformers. Name the base "
            "in safetensors."
        )
    return {**config, "architectures": [kind], "quantization_config": {"quant_method": "gguf", "gguf_file": path.name}}


def _matched(file: GgufFile, model: nn.Module) -> list[tuple[Stored, str, bool]]:
    """The file's tensors, each with the parameter that it is and whether that is turned, in the file's order."""
    by_name: dict[str, tuple[str, bool]] = {}
    for key, _ in model.named_parameters(remove_duplicate=False):
        path, _, part = key.rpartition(".")
        name = file.name_of(path)
        if name is not None:
            turned = part == "weight" and isinstance(model.get_submodule(path), Conv1D)
            by_name[f"{name}.{part}"] = key, turned
    return [(tensor, *by_name[name]) for name, tensor in file.tensors.items() if name in by_name]
