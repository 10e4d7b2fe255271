"""A process killed at each step in which it changes the file system, and a file system that is full: real ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# A base of files, written again and again; each time in a process that kills itself one step later.
SETTING = """
import gc, json, os, shutil, signal, subprocess, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from dora_peft.adapters.export import companions, manifest, shards, writing
from dora_peft.adapters.formats import Checkpoint

folder = Path(sys.argv[1])

def make_base(rows):
    (folder / "base").mkdir()
    for number in (1, 2, 3):
        tensors = {f"{number}.{name}": torch.randn(rows, 64) for name in "ab"}
        save_file(tensors, folder / "base" / f"model-{number}.safetensors", metadata={"format": "pt"})
    (folder / "base" / "config.json").write_text("{}")
    (folder / "base" / "tokenizer.json").write_text("{}")

def run(out):
    base = Checkpoint(folder / "base")
    piece = writing.Piece(("2.a",), lambda: {"2.a": base.tensor("2.a") * 2}, base.entries["2.a"].nbytes)
    writing.write_model(base, folder / out, [piece], dtype=None, config={}, options={})

def bytes_in(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
"""

KILLED = (
    SETTING
    + """
# everything by which a run changes the file system, or waits for it
STEPS = [(os, name) for name in ("replace", "fsync", "mkdir", "unlink", "rmdir")] + [(shards.ShardWriter, "_write")]

def run_and_die(out, at):
    count = 0
    def counted(call):
        def counting(*args, **kwargs):
            nonlocal count
            # after a step is before the next
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return counting
    for owner, name in STEPS:
        setattr(owner, name, counted(getattr(owner, name)))
    run(out)

def in_another_process(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

make_base(4)
run("whole")
# a child would copy what its collector touches
gc.collect()
gc.freeze()
whole, found, at = bytes_in(folder / "whole"), [], 0
while True:
    at += 1
    died = in_another_process(lambda: run_and_die("out", at))
    there = (folder / "out").exists()
    same = not there or bytes_in(folder / "out") == whole
    partial = (folder / "out.partial").exists()
    if not there:
        run("out")
    ends = bytes_in(folder / "out") == whole and not (folder / "out.partial").exists()
    found.append({"died": died, "there": there, "same": same, "partial": partial, "ends": ends})
    shutil.rmtree(folder / "out")
    if died == 0:
        break
print(json.dumps(found))
"""
)

FULL = (
    SETTING
    + """
def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder / "disk"], check=True)

make_base(256)
(folder / "disk").mkdir()
found, usage = {}, writing.shutil.disk_usage
for what, options, free in [
    ("said before", "size=300k", None),
    # the space that was free when it was asked for is taken before it is used
    ("in the middle", "size=300k", 2**40),
    ("no inode", "size=4m,nr_inodes=4", 2**40),
]:
    mount(options)
    if free is not None:
        writing.shutil.disk_usage = lambda path, free=free: usage(path)._replace(free=free)
    try:
        run("disk/out")
        said = "written"
    except OSError as error:
        said = f"{type(error).__name__}: {error}"
    left = sorted(str(path.relative_to(folder / "disk")) for path in (folder / "disk").rglob("*"))
    resumed = None
    if what == "in the middle":
        subprocess.run(["mount", "-o", "remount,size=4m", folder / "disk"], check=True)
        run("whole")
        run("disk/out")
        resumed = bytes_in(folder / "disk" / "out") == bytes_in(folder / "whole")
    found[what] = {"said": said, "left": left, "resumed": resumed}
    subprocess.run(["umount", folder / "disk"], check=True)
print(json.dumps(found))
"""
)


def outcome(program, folder, before=()):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, "-W", "ignore", "-c", program, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes of POSIX")
def test_killed_at_any_step_nothing_half_is_there_and_a_second_run_ends_it(tmp_path):
    found = outcome(KILLED, tmp_path)
    assert len(found) > 30
    assert all(one["died"] == -9 for one in found[:-1])
    assert found[-1]["died"] == 0
    for step, one in enumerate(found):
        assert one["same"], step
        assert one["ends"], step
    # the rename is the last step but one: almost everywhere there is something to go on from
    assert sum(one["partial"] for one in found) > len(found) - 6
    assert sum(one["there"] for one in found) < 6


def test_a_full_disk_leaves_no_model_and_what_is_finished(tmp_path):
    """A file system of its own, which vanishes with the program."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("needs unshare of Linux")
    own = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
    allowed = subprocess.run([*own, "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"mounting is not permitted here: {allowed.stderr.strip()}")
    found = outcome(FULL, tmp_path, own)
    assert len(found) == 3
    for what, one in found.items():
        assert one["said"].startswith("NotWrittenError: Could not write"), what
        assert "Nothing was written or replaced there" in one["said"], what
        assert "\n" not in one["said"], what
        assert "out" not in one["left"], what
        assert not any(name.endswith(".tmp") for name in one["left"]), what
    assert found["said before"]["left"] == []
    assert "MiB are needed" in found["said before"]["said"]
    assert "No space left" in found["in the middle"]["said"]
    assert "out.partial/model-1.safetensors" in found["in the middle"]["left"]
    assert "run the same command again" in found["in the middle"]["said"]
    assert found["in the middle"]["resumed"]
