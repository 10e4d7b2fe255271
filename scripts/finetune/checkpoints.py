"""The output folder of a fine-tune run: no other run's files, which checkpoint to continue from, none half-written."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import one_line
from common.files import replacing

# What a run writes at its start, to know itself again.
SETTINGS = "run_settings.json"
# Files of a run, beside its checkpoints.
OUTPUTS = (
    "adapter_config.json", "adapter_model.*", "config.json", "model*.safetensors", "pytorch_model*", "merged",
    "trainer_state.json", "training_args.bin", "eval_results.json",
)  # fmt: skip


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


def find_checkpoint(output_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint to continue from, or None to start a new run.

    Args:
        output_dir: folder of the run.
        resume: `true` for the newest whole checkpoint in `output_dir`, if there is one; `false` or None for a new run;
            or the path of a checkpoint.

    Raises:
        ValueError: the checkpoint asked for is missing or incomplete.
    """
    if not wants_to_resume(resume):
        return None
    checkpoints = [path for path in list_checkpoints(output_dir) if is_whole(path)]
    if str(resume).lower() == "true":
        return checkpoints[-1] if checkpoints else None
    checkpoint = Path(str(resume))
    if not is_whole(checkpoint):
        whole = [str(path) for path in checkpoints]
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is no complete checkpoint; {output_dir} holds {whole or 'none'}."
        )
    return checkpoint


def wants_to_resume(resume: str | None) -> bool:
    return resume is not None and resume.lower() != "false"


def check_output_dir(output_dir: Path, settings: Mapping[str, Any], resume: str | None) -> None:
    """Check that a run can write to its folder, and mixes with no other run's output.

    A folder that Trainer or this script wrote to is taken again only to continue, and only by the same run: its
    `run_settings.json` says which that is. Otherwise a whole model saved beside another run's adapter would load with
    that adapter on top, in silence.

    Args:
        settings: what makes two runs the same, as in `run_settings.json`.
        resume: as in `find_checkpoint`.

    Raises:
        ValueError: naming what was found, or why nothing can be written.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"output_dir: cannot write to {output_dir}: {error.strerror}.") from error
    found = list_outputs(output_dir)
    if not found:
        return
    holds = f"output_dir: {output_dir} holds {found[-1].name} of an earlier run"
    if not wants_to_resume(resume):
        more = "continue it with --resume_from_checkpoint true, " if list_checkpoints(output_dir) else ""
        raise ValueError(f"{holds}; {more}choose another --output_dir, or remove it.")
    difference = first_difference(output_dir, settings)
    if difference is not None:
        raise ValueError(f"{holds}, not of this one: {difference}. Choose another --output_dir, or remove it.")


def check_same_run(
    checkpoint: Path, output_dir: Path, method: str, optimizer: str, settings: Mapping[str, Any]
) -> None:
    """Check that a run can go on from a checkpoint, of its own folder or of another's.

    Args:
        optimizer: whose state a checkpoint may hold, as in `run_settings.json`.
        settings: as in `check_output_dir`, which compares those of the run's own folder.

    Raises:
        ValueError: the checkpoint is of a run that trained something else, or otherwise.
    """
    found = read_method(checkpoint)
    if found is not None and found != kind_of(method):
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is of a run with the method {found}, expected {method}. Choose "
            "another checkpoint."
        )
    folder = checkpoint.absolute().parent
    compared = {} if folder.resolve() == output_dir.resolve() else dict(settings)
    if any(checkpoint.glob("optimizer*")):
        compared["optim"] = optimizer
    difference = first_difference(folder, compared)
    if difference is not None:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is not of this run: {difference}. Choose another checkpoint."
        )


def first_difference(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The first of the settings that is known to be another for the run whose output a folder holds, in words."""
    earlier = read_settings(folder)
    different = (name for name, value in settings.items() if name in earlier and earlier[name] != value)
    name = next(different, None)
    return None if name is None else f"{name} is {earlier[name]!r} there and {settings[name]!r} here"


def list_outputs(output_dir: Path) -> list[Path]:
    """What runs of this script or of Trainer left in a folder, checkpoints last."""
    files = [path for pattern in OUTPUTS for path in sorted(output_dir.glob(pattern))]
    return files + list_checkpoints(output_dir)


def read_settings(output_dir: Path) -> dict[str, Any]:
    """What is known of the run whose output a folder holds."""
    path = output_dir / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        # Written by an earlier version of this script: the files say what was trained.
        methods = [read_method(folder) for folder in (output_dir, *list_checkpoints(output_dir))]
        found = next((method for method in methods if method is not None), None)
        return {} if found is None else {"weights": found}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}. Choose another folder.") from error
    return settings if isinstance(settings, dict) else {}


def read_method(folder: Path) -> str | None:
    """What the weights in a folder are: of DoRA, of LoRA, in full, or None if there are none."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "full" if (folder / "config.json").is_file() else None
    return "dora" if config.get("use_dora") else "lora"


def kind_of(method: str) -> str:
    """The methods that write the same kind of file have one name."""
    return "dora" if method == "peft_dora" else method


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
