"""dora_export.json, written and read back."""

import json

import pytest
from push_fixtures import record

from dora_peft.adapters import UnreadableError
from dora_peft.adapters.export.record import NAME, read_record


@pytest.mark.parametrize("command", [None, "dora-peft export a --base b --out c --as exact"])
def test_what_is_written_is_read(command, tmp_path):
    made = record("exact", command=command)
    made.write(tmp_path)
    assert read_record(tmp_path) == made


def test_a_folder_without_one(tmp_path):
    assert read_record(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"route": "gguf"}, "its route is 'gguf'"),
        ({"totals": {"error_over_update": "small"}}, "its totals is"),
        ({"totals": {"error_over_update": True}}, "its totals is"),
        ({"modules": {"a": 1}}, "its modules is"),
        ({"modules": []}, "its modules is"),
        ({"notes": [1]}, "its notes is"),
        ({"adapters": "one"}, "its adapters is"),
        ({"statement": None}, "its statement is 'None'"),
        ({"command": ["rm"]}, "its command is"),
    ],
)
def test_another_tools_file_is_refused_in_one_line(change, said, tmp_path):
    path = record("exact").write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UnreadableError, match=said) as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"exact"', "[" * 100_000, "{}"])
def test_a_damaged_file_is_refused(text, tmp_path):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(UnreadableError, match="Cannot read"):
        read_record(tmp_path)


def test_entries_of_later_versions_are_left_aside(tmp_path):
    path = record("lora").write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "newer": 1}))
    assert read_record(tmp_path) == record("lora")


def test_warnings_name_the_worst_module():
    said = record("exact").warnings()
    assert any("2 of 2 modules, at most 25.00% in 'model.layers.0.mlp.down_proj'" in one for one in said)
    assert any("1 of 2 modules, at most 50.00% in 'model.layers.1.mlp.down_proj'" in one for one in said)
