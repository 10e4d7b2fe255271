"""Route `exact` over a .gguf: llama.cpp's file with rows c W0, whose codes stay, and llama.cpp's LoRA c s B A.

W0 is what the file's codes stand for, so that c, which depends on the norms of W0 + s B A, belongs to them. A scale
times c is rounded to what the file holds, fp16 mostly: a relative 2^-11 at worst, where merging into the codes and
quantising again would lose an update that is smaller than their steps.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..._files import saving
from ..formats import Module, UnreadableError
from .adapted import AdaptedBase
from .codes.gguf import rewrite_gguf, scaled_rows
from .exact import Exact
from .gguf import ARCHITECTURES, llama_cpp_tensors, write_gguf
from .gguf_checkpoint import GgufCheckpoint
from .manifest import sync_folder
from .pieces import check_all
from .plain import Factors, plain_modules
from .record import NAME, read_record
from .splitting import Loss, loss_of, split
from .writing import Report

# The files of an export.
BASE, ADAPTER = "base.gguf", "adapter.gguf"
INSTEAD = (
    "Name the base in safetensors, export with --as exact, and convert what that writes by llama.cpp's converters."
)


def export_exact_gguf(
    adapted: AdaptedBase,
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float16,
    force: bool = False,
    dry_run: bool = False,
    finish: Callable[[Exact, Path], Path] | None = None,
    progress: Report | None = None,
) -> Exact:
    """Write `out`/base.gguf, whose rows are c W0, and `out`/adapter.gguf, the plain LoRA c s B A over it.

    Args:
        adapted: A base of `GgufCheckpoint` and its adapters.
        out: The folder to write, complete or absent.
        dtype: Of the adapter; fp32, with a note, if a number is too large for it. The base keeps its types.
        force: Replace such an export at `out`.
        dry_run: Measure the losses alone.
        finish: Called with what is known of the export and the unfinished folder, to write what belongs to it.
        progress: Called with the path of each module that is measured.

    Raises:
        UnreadableError: Something that was trained has no place in these files, or a scale leaves fp16's range; it is
            named.
        FileExistsError, ValueError: Something is at `out`, see `_check_target`.
        NotSavedError: It cannot be written; what was at `out` is as it was.
    """
    checkpoint = adapted.checkpoint
    assert isinstance(checkpoint, GgufCheckpoint)
    check_all(adapted)
    check_held(adapted)
    target = _check_target(Path(out), checkpoint.file.path, force=force)
    measured = {}
    for path in adapted.layers:
        if progress is not None:
            progress(path)
        measured[path] = _measure(adapted, checkpoint, path, dtype)
    scales = {path: c for path, (_, c, _) in measured.items()}
    modules, notes = _modules({path: own for path, (_, _, own) in measured.items()}, checkpoint)
    one = next(iter(modules.values()), None)
    done = Exact(
        dtype if one is None else one.lora_A.dtype, {path: loss for path, (loss, *_) in measured.items()},
        0 if one is None else one.rank, [], notes,
    )  # fmt: skip
    if dry_run:
        return done
    need = checkpoint.file.path.stat().st_size + sum(one.lora_A.nbytes + one.lora_B.nbytes for one in modules.values())
    with _made_beside(target, need) as folder:
        rewrite_gguf(checkpoint.file.path, folder / BASE, scales)
        if modules:
            write_gguf(modules, checkpoint.config, folder / ADAPTER, name=f"for {BASE} of {target.name}")
        if finish is not None:
            finish(done, folder)
        names = sorted(path.name for path in folder.iterdir())
    done.files[:] = [target / name for name in names]
    return done


def _modules(factors: Mapping[str, Factors], checkpoint: GgufCheckpoint) -> tuple[dict[str, Module], list[str]]:
    """The plain LoRA of the modules whose factors are not zero, and what a reader should know.

    Raises:
        UnreadableError: llama.cpp has no place for one.
    """
    live = {path: own for path, own in factors.items() if bool(own.lora_B.any())}
    if not live:
        return {}, [f"the adapters are magnitudes alone: {BASE} is the whole model"]
    # llama.cpp takes any rank
    modules, notes = plain_modules(live, max(len(own.lora_A) for own in live.values()))
    # before anything is written
    llama_cpp_tensors(modules, checkpoint.config)
    return modules, [*notes, f"{ADAPTER} belongs to {BASE} alone: over another file it is another adapter"]


def check_held(adapted: AdaptedBase) -> None:
    """See that a .gguf with scaled rows and llama.cpp's LoRA hold all that was trained.

    Raises:
        UnreadableError: They do not hold something; it is named.
    """
    checkpoint = adapted.checkpoint
    assert isinstance(checkpoint, GgufCheckpoint)
    kind = ARCHITECTURES.get(str(checkpoint.config["model_type"]))
    if kind is None or kind.name != checkpoint.file.architecture:
        raise UnreadableError(
            f"'{checkpoint.name}' is a {checkpoint.config['model_type']}, which llama.cpp calls "
            f"{checkpoint.file.architecture}, and how its adapters are stored is known here of "
            f"{', '.join(ARCHITECTURES)} alone. {INSTEAD}"
        )
    others = list(adapted.trained())
    if others:
        raise UnreadableError(
            f"The adapter also trained '{others[0]}' ({len(others)} such parameters), which a .gguf with scaled rows "
            f"does not hold. {INSTEAD}"
        )
    for path, layer in adapted.layers.items():
        shared = adapted.names.shared(f"{path}.weight")
        if isinstance(layer.get_base_layer(), nn.Embedding) or shared:
            what = f"is tied to '{shared[0]}'" if shared else "is an embedding, whose rows are tokens"
            raise UnreadableError(f"Module '{path}' {what}, so that no scale of '{checkpoint.name}' takes c. {INSTEAD}")


def _measure(
    adapted: AdaptedBase, checkpoint: GgufCheckpoint, path: str, dtype: torch.dtype
) -> tuple[Loss, Tensor, Factors]:
    """What rounding costs a module, its c, and the factors of its plain LoRA."""
    with adapted.at_hand(path) as layer:
        parts = adapted.parts(path, layer)
        whole = split(parts)
        own = Factors(whole.lora_A, whole.lora_B).rounded(dtype)
        served = scaled_rows(checkpoint.file, path, whole.scale).to(adapted.device)
        loss = loss_of(layer, parts, served, (own.lora_A, own.lora_B))
        return loss, whole.scale.cpu(), Factors(own.lora_A.cpu(), own.lora_B.cpu())


def _check_target(target: Path, base: Path, *, force: bool) -> Path:
    """Where the folder may be written.

    Raises:
        FileExistsError: Something is there, and `force` is not set or it is no such export; or the base is in it.
        ValueError: It lies below a file.
    """
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"'{target}' cannot be made: '{above}' is no folder. Choose another name.")
    if base.resolve().is_relative_to(target.resolve()):
        raise FileExistsError(f"'{target}' holds the base model, which is read while it is written. Choose another.")
    taken = target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir())))
    if not taken:
        return target
    if not force:
        raise FileExistsError(f"'{target}' is there already. Choose another name, or pass --force to replace it.")
    names = {entry.name for entry in target.iterdir()} if target.is_dir() and not target.is_symlink() else set()
    if not {BASE, NAME} <= names <= {BASE, ADAPTER, NAME} or read_record(target) is None:
        raise FileExistsError(f"'{target}' is no export of a .gguf: --force replaces one alone. Choose another name.")
    return target


@contextmanager
def _made_beside(target: Path, need: int) -> Iterator[Path]:
    """A new folder beside `target`, put in its place at the end, or gone."""
    with saving("the export", str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if need > free:
            raise OSError(f"{need / 2**20:.1f} MiB are needed, and {free / 2**20:.1f} MiB are free")
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.writing-", dir=target.parent))
        try:
            made, old = staging / "new", staging / "old"
            made.mkdir()
            yield made
            for path in made.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(made)
            if target.exists():
                os.replace(target, old)
            try:
                os.replace(made, target)
            except OSError:
                if old.exists():
                    os.replace(old, target)
                raise
            sync_folder(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
