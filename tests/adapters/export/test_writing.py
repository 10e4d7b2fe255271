"""Checkpoints made of others: whole or not at all, killed anywhere and gone on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_peft.adapters.export import writing
from dora_peft.adapters.export.writing import NotWrittenError, Piece, write_model
from dora_peft.adapters.formats import Checkpoint, UnreadableError


@pytest.fixture
def base(tmp_path):
    """Three files, as an index names them, with a tokenizer."""
    folder = tmp_path / "base"
    folder.mkdir()
    where = {}
    for number in (1, 2, 3):
        tensors = {f"layers.{number}.{name}.weight": torch.randn(4, 6) for name in "abc"}
        name = f"model-0000{number}-of-00003.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"tokens": 1}')
    return Checkpoint(folder)


def pieces_of(base, calls=None):
    """One tensor of each file times two, and one that is new."""

    def times_two(key):
        if calls is not None:
            calls.append(key)
        return {key: base.tensor(key) * 2}

    replaced = [Piece((f"layers.{n}.b.weight",), lambda n=n: times_two(f"layers.{n}.b.weight"), 96) for n in (1, 2, 3)]
    return [*replaced, Piece((), lambda: {"head.weight": torch.ones(2, 4)}, 32)]


def write(base, out, pieces=None, **options):
    settings = {"dtype": None, "config": {"new": True}, "options": {"route": "test"}, **options}
    return write_model(base, out, pieces_of(base) if pieces is None else pieces, **settings)


def tensors_in(folder):
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def bytes_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_replaced_copied_and_new(base, tmp_path):
    files = write(base, tmp_path / "out")
    expected = {key: base.tensor(key) * (2 if ".b." in key else 1) for key in base.entries}
    expected["head.weight"] = torch.ones(2, 4)
    found = tensors_in(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    assert not (tmp_path / "out.partial").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"new": True}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"tokens": 1}'
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert all(key in load_file(tmp_path / "out" / name) for key, name in index["weight_map"].items())
    assert index["weight_map"].keys() == expected.keys()
    again = Checkpoint(tmp_path / "out")
    assert again.files() == base.files()
    assert again.metadata == {"format": "pt"}


def test_a_single_file_has_the_name_that_transformers_looks_for(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    files = write(Checkpoint(tmp_path / "weights.safetensors"), tmp_path / "out", [])
    assert tmp_path / "out" / "model.safetensors" in files
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_floats_are_cast_but_for_quantised_weights_and_indices(tmp_path):
    tensors = {
        "q.weight": torch.zeros(8, dtype=torch.uint8), "q.weight.absmax": torch.ones(4), "q.bias": torch.ones(4),
        "g.qweight": torch.zeros(8, dtype=torch.int32), "g.scales": torch.ones(4), "position": torch.arange(4),
        "f.weight": torch.zeros(8).to(torch.float8_e4m3fn), "f.weight_scale": torch.ones(4), "n.weight": torch.ones(4),
        "h.attn.bias": torch.zeros(8, dtype=torch.uint8), "h.attn.c_attn.weight": torch.ones(4),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    write(Checkpoint(tmp_path / "model.safetensors"), tmp_path / "out", [], dtype=torch.float16)
    found = tensors_in(tmp_path / "out")
    cast = {key for key in found if found[key].dtype == torch.float16}
    assert cast == {"q.bias", "n.weight", "h.attn.c_attn.weight"}
    assert all(found[key].dtype == tensors[key].dtype for key in tensors.keys() - cast)


def test_tensors_of_one_piece_from_two_files_go_to_the_first(base, tmp_path):
    keys = ("layers.1.a.weight", "layers.3.a.weight")
    write(base, tmp_path / "out", [Piece(keys, lambda: dict.fromkeys(keys, torch.ones(1)), 8)])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {index["weight_map"][key] for key in keys} == {"model-00001-of-00003.safetensors"}
    assert index["weight_map"].keys() == base.entries.keys()


def test_a_key_is_replaced_once_and_is_there(base, tmp_path):
    piece = Piece(("layers.1.a.weight",), dict, 0)
    for pieces, said in (([piece, piece], "by two"), ([Piece(("nothing",), dict, 0)], "is not there")):
        with pytest.raises(ValueError, match=said):
            write(base, tmp_path / "out", pieces)
    twice = Piece((), lambda: {"layers.1.a.weight": torch.ones(1)}, 4)
    with pytest.raises(ValueError, match="two files"):
        write(base, tmp_path / "out", [twice])
    assert not (tmp_path / "out").exists()


def interrupted(base, out, after):
    """A run that ends in an error at a tensor, and what it had finished."""
    done = []

    def stop(key):
        done.append(key)
        if len(done) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(base, out, progress=stop)
    assert not out.exists()


@pytest.mark.parametrize(("after", "finished"), [(0, 0), (3, 1), (5, 1), (6, 2), (9, 2)])
def test_an_interrupted_run_goes_on_after_its_finished_files(base, tmp_path, after, finished):
    write(base, tmp_path / "whole")
    interrupted(base, tmp_path / "out", after)
    calls = []
    write(base, tmp_path / "out", pieces_of(base, calls))
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole")
    assert len(calls) == 3 - finished
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_file_that_was_damaged_is_written_again(base, tmp_path):
    write(base, tmp_path / "whole")
    interrupted(base, tmp_path / "out", 6)
    path = tmp_path / "out.partial" / base.files()[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    calls = []
    write(base, tmp_path / "out", pieces_of(base, calls))
    assert calls == ["layers.1.b.weight", "layers.3.b.weight"]
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole")


def change_base(base):
    path = base.folder / base.files()[0]
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return {}


OTHERS = {
    "base's model-00001": change_base,
    "config": lambda base: {"config": {"new": False}},
    "option adapter": lambda base: {"options": {"route": "test", "adapter": "2"}},
    "option dtype": lambda base: {"dtype": torch.float16},
    "plan": lambda base: {"pieces": []},
}


@pytest.mark.parametrize("what", OTHERS)
def test_going_on_with_something_else_is_refused(base, tmp_path, what):
    interrupted(base, tmp_path / "out", 4)
    before = bytes_in(tmp_path / "out.partial")
    options = OTHERS[what](base)
    with pytest.raises(FileExistsError, match=rf"begun with another {what}.*--force") as caught:
        write(base, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert bytes_in(tmp_path / "out.partial") == before
    write(base, tmp_path / "fresh", **options)
    write(base, tmp_path / "out", force=True, **options)
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "fresh")


def test_what_is_no_unfinished_export_is_left_alone(base, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    for force in (False, True):
        with pytest.raises(FileExistsError, match="no unfinished export"):
            write(base, tmp_path / "out", force=force)
    assert (tmp_path / "out.partial" / "mine").read_text() == "mine"


def test_two_runs_at_once_are_refused(base, tmp_path):
    def again(key):
        with pytest.raises(FileExistsError, match="Another run is writing"):
            write(base, tmp_path / "out")

    write(base, tmp_path / "out", progress=again)


def test_a_model_is_replaced_only_when_asked(base, tmp_path):
    write(base, tmp_path / "out")
    with pytest.raises(FileExistsError, match="--force"):
        write(base, tmp_path / "out")
    # what a run leaves that was killed between its last two steps
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "config.json").write_text("{}")
    write(base, tmp_path / "out", config={"newer": True}, force=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"newer": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_an_empty_folder_is_filled(base, tmp_path):
    (tmp_path / "out").mkdir()
    write(base, tmp_path / "out")
    assert tensors_in(tmp_path / "out")


def test_what_is_no_model_or_the_base_itself_is_never_replaced(base, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    (tmp_path / "file").write_text("mine")
    shutil.copytree(base.folder, tmp_path / "trained")
    before = bytes_in(tmp_path)
    for name in ("notes", "link", "file", "trained", "base", ".", "file/out"):
        with pytest.raises((FileExistsError, ValueError), match="Choose another name"):
            write(base, tmp_path / name, force=True)
    assert bytes_in(tmp_path) == before


def test_too_little_space_is_said_before_anything_is_made(base, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(NotWrittenError, match=r"MiB are needed, and 0\.0 MiB are free") as caught:
        write(base, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_links_of_weights_that_lead_out_are_refused(base, tmp_path):
    path = base.folder / base.files()[1]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnreadableError, match="leads out of its folder"):
        write(Checkpoint(base.folder), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_names_files_of_its_folder_alone(base, tmp_path, name):
    shutil.copy(base.folder / base.files()[0], tmp_path / "elsewhere.safetensors")
    index = base.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layers.1.a.weight": name}}))
    with pytest.raises(UnreadableError, match="its index names"):
        Checkpoint(base.folder)
