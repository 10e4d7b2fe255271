"""Checkpoints of a fine-tune run: which one to continue from, and none that is half-written."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.files import replacing
from finetune.config import FinetuneConfig


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: Trainer writes `trainer_state.json` last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def find_checkpoint(config: FinetuneConfig) -> Path | None:
    """The checkpoint to continue from, or None to start a new run.

    Raises:
        ValueError: if the checkpoint asked for is missing or incomplete, or if a new run would mix with an older one's.
    """
    output_dir = Path(config.output_dir)
    if isinstance(config.resume_from_checkpoint, str):
        checkpoint = Path(config.resume_from_checkpoint)
        if not is_whole(checkpoint):
            whole = [str(path) for path in list_checkpoints(output_dir) if is_whole(path)]
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} is no complete checkpoint; {output_dir} holds {whole or 'none'}."
            )
        return checkpoint
    checkpoints = list_checkpoints(output_dir)
    if config.resume_from_checkpoint:
        return next((path for path in reversed(checkpoints) if is_whole(path)), None)
    if checkpoints:
        raise ValueError(
            f"output_dir: {output_dir} holds {checkpoints[-1].name} of an earlier run; continue it with "
            "--resume_from_checkpoint true, choose another --output_dir, or remove it."
        )
    return None


@contextlib.contextmanager
def whole_checkpoints(output_dir: Path) -> Iterator[None]:
    """Remove what a killed run left of its last checkpoint, and what a full disk leaves of one in this run.

    Raises:
        OSError: naming the checkpoint that could not be written.
    """
    remove_incomplete_checkpoints(output_dir)
    try:
        yield
    except Exception as error:
        removed = remove_incomplete_checkpoints(output_dir)
        if not removed:
            raise
        raise OSError(
            f"{removed[-1]}: the checkpoint could not be saved ({error}) and was removed. Free some space and run "
            "again with --resume_from_checkpoint true, which goes on from the checkpoint before."
        ) from error


def remove_incomplete_checkpoints(output_dir: Path) -> list[Path]:
    """Remove the checkpoints in `output_dir` that were not written to their end, and return their paths."""
    incomplete = [path for path in list_checkpoints(output_dir) if not is_whole(path)]
    for path in incomplete:
        shutil.rmtree(path)
    return incomplete


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder to save into, whose files move into `target` once all are written; an error leaves nothing behind.

    Raises:
        OSError: naming `target`, with what to do.
    """
    try:
        with replacing(target) as staging:
            yield staging
    except Exception as error:
        raise OSError(
            f"{target}: could not be saved ({error}); nothing was left half-written. Free some space and run again, "
            "with --resume_from_checkpoint true if there is a checkpoint."
        ) from error
