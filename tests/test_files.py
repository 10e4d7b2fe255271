"""Files are written completely or not at all."""

import errno
import os
import pickle
import stat
import tempfile
import threading

import pytest
from safetensors import SafetensorError

from dora_peft._files import NotSavedError, atomic_write_text, saving, staged_directory


def tree(folder):
    """Every file below `folder` with its content, hidden ones included."""
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_files_and_subfolders_arrive_on_success(tmp_path):
    target = tmp_path / "new" / "adapter"
    with staged_directory(str(target)) as staging:
        os.makedirs(os.path.join(staging, "sub"))
        atomic_write_text(os.path.join(staging, "a.txt"), "a")
        atomic_write_text(os.path.join(staging, "sub", "b.txt"), "b")
        assert not (target / "a.txt").exists()
    assert tree(target) == {"a.txt": "a", os.path.join("sub", "b.txt"): "b"}
    assert sorted(os.listdir(target)) == ["a.txt", "sub"]


def test_other_files_stay_and_same_names_are_replaced(tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / "a.txt").write_text("old")
    with staged_directory(str(tmp_path)) as staging:
        atomic_write_text(os.path.join(staging, "a.txt"), "new")
    assert tree(tmp_path) == {"kept.txt": "kept", "a.txt": "new"}


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), ValueError("x")])
def test_an_error_leaves_the_old_files_and_no_temporary_ones(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")

    def fail_half_way():
        with staged_directory(str(tmp_path)) as staging:
            (tmp_path / os.path.basename(staging) / "a.txt").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail_half_way()
    assert tree(tmp_path) == {"a.txt": "old"}
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_leaves_no_new_directory(tmp_path):
    target = tmp_path / "new" / "adapter"
    with pytest.raises(OSError, match="full"), staged_directory(str(target)):
        raise OSError("full")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_was_there_empty_stays(tmp_path):
    with pytest.raises(OSError, match="full"), staged_directory(str(tmp_path)):
        raise OSError("full")
    assert tmp_path.is_dir()


def test_atomic_text_replaces_or_keeps(tmp_path):
    path = tmp_path / "a.json"
    atomic_write_text(str(path), "one ü")
    assert path.read_text(encoding="utf-8") == "one ü"
    with pytest.raises(UnicodeEncodeError):
        # a lone surrogate cannot be written
        atomic_write_text(str(path), "\ud800")
    assert path.read_text(encoding="utf-8") == "one ü"
    assert os.listdir(tmp_path) == ["a.json"]


def test_atomic_text_in_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    atomic_write_text("a.txt", "here")
    assert tree(tmp_path) == {"a.txt": "here"}


def test_written_files_are_readable_as_ordinary_ones(tmp_path):
    """A temporary directory is private; what comes out of it must have the permissions of any new file."""
    (tmp_path / "ordinary").write_text("")
    with staged_directory(str(tmp_path / "out")) as staging:
        os.makedirs(os.path.join(staging, "sub"))
        atomic_write_text(os.path.join(staging, "a"), "")
        atomic_write_text(os.path.join(staging, "sub", "b"), "")
    (tmp_path / "folder").mkdir()

    def mode(path):
        return stat.S_IMODE(os.stat(path).st_mode)

    assert mode(tmp_path / "out" / "a") == mode(tmp_path / "out" / "sub" / "b") == mode(tmp_path / "ordinary")
    assert mode(tmp_path / "out") == mode(tmp_path / "out" / "sub") == mode(tmp_path / "folder")


def test_two_writers_of_one_directory_do_not_meet(tmp_path):
    """Each has a staging directory of its own; the result is one of the two files, whole."""
    barrier = threading.Barrier(2, timeout=60)

    def write(text):
        with staged_directory(str(tmp_path)) as staging:
            barrier.wait()
            atomic_write_text(os.path.join(staging, "a.txt"), text)
            barrier.wait()

    texts = ["x" * 10_000, "y" * 10_000]
    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tree(tmp_path)["a.txt"] in texts
    assert os.listdir(tmp_path) == ["a.txt"]


def test_no_new_directory_stays_if_none_can_be_made_in_it(tmp_path, monkeypatch):
    """A file system without inodes left."""

    def no_space(**kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", no_space)
    with pytest.raises(OSError, match="No space left"), staged_directory(str(tmp_path / "a" / "b")):
        raise AssertionError("the body runs")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("obstacle", ["a directory in place of a file", "a file in place of a directory"])
def test_what_cannot_be_replaced_is_found_before_the_first_file_is(tmp_path, obstacle):
    for name in ("a.txt", "z.txt"):
        (tmp_path / name).write_text("old")
    if obstacle == "a directory in place of a file":
        (tmp_path / "m.txt").mkdir()
    else:
        (tmp_path / "sub").write_text("mine")
    before = sorted(str(p) for p in tmp_path.rglob("*")), tree(tmp_path)

    def write():
        with staged_directory(str(tmp_path)) as staging:
            os.makedirs(os.path.join(staging, "new"))
            for name in ("a.txt", "m.txt", "z.txt", "new/b.txt"):
                atomic_write_text(os.path.join(staging, name), "new")
            if "sub" in before[1]:
                os.makedirs(os.path.join(staging, "sub"))
                atomic_write_text(os.path.join(staging, "sub", "b.txt"), "new")

    with pytest.raises(OSError, match=r"directory|exists"):
        write()
    assert (sorted(str(p) for p in tmp_path.rglob("*")), tree(tmp_path)) == before


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "I/O error"),
        # torch.save's
        (RuntimeError("[enforce fail at inline_container.cc:672] .\nunexpected pos 1 vs 2"), "unexpected pos 1 vs 2"),
        (NotSavedError("the config", "/staging", FULL), "No space left on device"),
    ],
)
def test_what_cannot_be_written_is_said_in_one_line(error, said):
    with pytest.raises(NotSavedError, match=said) as caught, saving("the adapter", "/some/where"):
        raise error
    message = str(caught.value)
    assert message.startswith("Could not save the adapter in '/some/where': ")
    assert message.count("Could not save") == message.count("Free space") == 1
    assert "\n" not in message
    assert caught.value.errno == (errno.ENOSPC if "device" in said else None)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("x"), KeyboardInterrupt()])
def test_other_errors_are_not_the_disks(error):
    with pytest.raises(type(error)) as caught, saving("the adapter", "/some/where"):
        raise error
    assert caught.value is error


def test_the_error_travels_between_processes():
    with pytest.raises(NotSavedError) as caught, saving("the adapter", "folder"):
        raise OSError(errno.ENOSPC, "No space left on device")
    found = pickle.loads(pickle.dumps(caught.value))
    assert (type(found), str(found), found.errno) == (NotSavedError, str(caught.value), errno.ENOSPC)
