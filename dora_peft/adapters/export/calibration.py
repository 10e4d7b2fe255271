"""How large the inputs of each module are on a text, by which a fit is weighted.

A text file is split at blank lines, or into its lines if there are none, and long texts into windows; each is one
sequence, so that nothing is padded. The model is the adapted one, in memory, as transformers and PEFT load it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..formats import UnreadableError

WINDOW = 512
# Fewer say too little of hundreds of inputs.
LEAST_TOKENS = 128


class Tokenizer(Protocol):
    """What of transformers' tokenizers is used."""

    def __call__(self, text: str) -> Mapping[str, list[int]]: ...


def tokenizer_of(name: str, **options: str) -> Tokenizer:
    """The tokenizer of a base model: a folder, or a name on the Hub, with options of `from_pretrained`.

    Raises:
        UnreadableError: There is none.
    """
    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(name, **options))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        said = str(error).strip().splitlines()
        raise UnreadableError(
            f"--calibration needs the tokenizer of '{name}', which cannot be loaded: "
            f"{said[0] if said else type(error).__name__}"
        ) from error


def read_texts(path: str) -> list[str]:
    """The texts of a file: parts between blank lines, or lines if there are no blank ones.

    Raises:
        UnreadableError: There is no such file, it is no text in UTF-8, or it is empty.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(
            f"--calibration '{path}': expected a text file in UTF-8, found: {' '.join(str(error).split())}."
        ) from error
    content = content.strip()
    parts = re.split(r"\n\s*\n", content)
    texts = [text for text in (parts if len(parts) > 1 else content.splitlines()) if text.strip()]
    if not texts:
        raise UnreadableError(f"--calibration '{path}' is empty: expected some pages of text.")
    return texts


def encode(
    texts: Sequence[str], tokenizer: Tokenizer, *, window: int = WINDOW, most: int | None = None
) -> list[Tensor]:
    """The token ids of texts, [1, length] each, at most `window` long.

    Args:
        texts: From `read_texts`.
        tokenizer: The base's.
        window: Tokens of a sequence.
        most: Stop after so many tokens.

    Raises:
        UnreadableError: They are fewer than `LEAST_TOKENS`.
    """
    found: list[Tensor] = []
    total = 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), window):
            part = ids[start : start + window]
            if most is not None:
                part = part[: most - total]
            # one token has no next one
            if len(part) > 1:
                found.append(torch.tensor(part)[None])
                total += len(part)
        if most is not None and total >= most:
            break
    if total < LEAST_TOKENS:
        raise UnreadableError(
            f"--calibration: the text has {total} tokens: expected at least {LEAST_TOKENS}, and better some thousands."
        )
    return found


def batched(sequences: Sequence[Tensor], most: int = 4096) -> list[Tensor]:
    """Sequences of one length beside each other, so that a file of short lines needs few passes and no padding.

    Args:
        sequences: [1, length] each, from `encode`.
        most: Tokens of a batch, if it holds more than one sequence.
    """
    by_length: dict[int, list[Tensor]] = {}
    for ids in sequences:
        by_length.setdefault(ids.shape[1], []).append(ids)
    found: list[Tensor] = []
    for length, alike in by_length.items():
        found += torch.cat(alike).split(max(1, most // length))
    return found


def mean_squares(model: nn.Module, paths: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The mean square of each input feature of some modules, [in] in fp64 on the CPU.

    A module that no token reached gets zeros. Of an embedding, whose inputs are tokens: their frequencies, as if each
    had been seen once more.

    Args:
        model: The adapted model, of PEFT or bare.
        paths: The modules' paths in the base model.
        batches: Token ids, [batch, length] each.

    Raises:
        UnreadableError: The model has no such module, or its inputs or the ids do not fit it.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(paths, 0)

    def note(path: str, module: nn.Module, x: Tensor) -> None:
        if _is_embedding(module):
            seen = torch.bincount(x.flatten().cpu(), minlength=_inputs(module)).double()
            number = x.numel()
        else:
            rows = _rows(x)
            seen, number = rows.square().sum(0, dtype=torch.float64).cpu(), len(rows)
        sums[path] = seen + sums.get(path, 0.0)
        counts[path] += number

    with torch.no_grad(), _inputs_seen(model, paths, note):
        for ids in batches:
            logits_of(model, ids)
    result = {}
    for path in paths:
        module = module_of(model, path)
        if _is_embedding(module):
            result[path] = (sums.get(path, torch.zeros(_inputs(module))).double() + 1) / (
                counts[path] + _inputs(module)
            )
        else:
            result[path] = sums[path] / counts[path] if counts[path] else torch.zeros(_inputs(module)).double()
    return result


class SecondMoments:
    """X^T X / n of the inputs of modules, made when they are asked for: `Weights` for `export_lora`.

    As many modules as fit into `memory` are looked at in one pass over the text, in the order of `paths`, which for a
    large model is about one layer at a time.

    Args:
        model: The adapted model.
        paths: The modules, in the order in which they will be asked for.
        batches: Token ids.
        memory: Bytes of all matrices that are kept at a time.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], batches: Sequence[Tensor], *, memory: int = 2**30
    ) -> None:
        self.model, self.paths, self.batches, self.memory = model, list(paths), batches, memory
        self.passes = 0
        self._known: dict[str, Tensor] = {}

    def __call__(self, path: str) -> Tensor | None:
        """[in, in] in fp32; the frequencies [in] of an embedding's tokens.

        Raises:
            UnreadableError: See `mean_squares`.
        """
        if path not in self._known:
            if path not in self.paths:
                return None
            self._known = self._of(self._next(path))
            self.passes += 1
        return self._known.pop(path)

    def _next(self, path: str) -> list[str]:
        """The modules from `path` on whose matrices fit into memory, at least one."""
        chosen, left = [path], self.memory
        for other in self.paths[self.paths.index(path) :]:
            module = module_of(self.model, other)
            size = 4 * _inputs(module) ** (1 if _is_embedding(module) else 2)
            if other != path and size > left:
                break
            chosen, left = [*chosen, other] if other != path else chosen, left - size
        return chosen

    def _of(self, paths: list[str]) -> dict[str, Tensor]:
        tables = [path for path in paths if _is_embedding(module_of(self.model, path))]
        sums: dict[str, Tensor] = {}
        counts = dict.fromkeys(paths, 0)

        def note(path: str, module: nn.Module, x: Tensor) -> None:
            rows = _rows(x)
            if path not in sums:
                sums[path] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            sums[path].addmm_(rows.T, rows)
            counts[path] += len(rows)

        others = [path for path in paths if path not in tables]
        if others:
            with torch.no_grad(), _inputs_seen(self.model, others, note):
                for ids in self.batches:
                    logits_of(self.model, ids)
        found = mean_squares(self.model, tables, self.batches) if tables else {}
        for path in others:
            # if no token reached it, it is fitted without weights
            empty = torch.zeros(_inputs(module_of(self.model, path)))
            found[path] = sums[path] / counts[path] if counts[path] else empty
        return found


@contextmanager
def _inputs_seen(
    model: nn.Module, paths: Sequence[str], note: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """A model whose modules report their inputs."""
    with ExitStack() as stack:
        for path in paths:
            module = module_of(model, path)
            hook = module.register_forward_pre_hook(lambda m, inputs, path=path: note(path, m, inputs[0]))
            stack.callback(hook.remove)
        yield


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of ids, in evaluation mode."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    except IndexError as error:
        raise UnreadableError(
            f"--calibration: the tokenizer gives ids up to {int(ids.max())}, and the model has fewer tokens: expected "
            "the tokenizer of this base."
        ) from error
    finally:
        model.train(training)
    return logits


def module_of(model: nn.Module, path: str) -> nn.Module:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        module: nn.Module = base.get_submodule(path)
    except AttributeError as error:
        raise UnreadableError(f"The model has no module '{path}': expected the adapter's base.") from error
    if isinstance(base_layer(module), (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise UnreadableError(
            f"Module '{path}' is a convolution: --calibration is for linear layers and embeddings. Leave it out."
        )
    return module


def base_layer(module: nn.Module) -> nn.Module:
    """The layer itself below its adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(base_layer(module), nn.Embedding)


def _inputs(module: nn.Module) -> int:
    """How many input features a layer has; tokens, of an embedding."""
    base = base_layer(module)
    if isinstance(base, nn.Embedding):
        return base.num_embeddings
    # that of GPT-2's Conv1D is called nx
    return int(getattr(base, "nx" if hasattr(base, "nx") else "in_features"))


def _rows(x: Tensor) -> Tensor:
    """Inputs as [tokens, in] in fp32."""
    return x.flatten(0, -2).float()
