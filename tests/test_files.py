"""Files are written completely or not at all."""

import os
import stat
import threading

import pytest

from dora_peft._files import atomic_write_text, staged_directory


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
