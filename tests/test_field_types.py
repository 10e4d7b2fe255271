"""Values of wrong types in a config: one ValueError that names the entry, from Python and from a file."""

import json
from dataclasses import fields
from typing import Literal

import pytest
from peft import PeftConfig

from dora_peft import DoraConfig
from dora_peft._field_types import describe, fits
from dora_peft._own_entries import MARKER

VALUES = [
    True, 5, -1.5, 0, float("inf"), float("nan"), "text", "", None, [1], ["a", 1], [], [["x"]], [[0, 1, 2]],
    {"a": None},
    {"a": "b"}, {"a": True}, {"a": -1}, {"a": [1.5]}, {},
]  # fmt: skip
NAMES = [field.name for field in fields(DoraConfig)]
# PEFT: a sub-config without its initialisation
pytestmark = pytest.mark.filterwarnings("ignore:.*will be ignored when:UserWarning")


def tried(call):
    """Nothing, or the message of a ValueError; any other exception is the test's failure."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def names(message, name):
    """Whether a message names a field: the rank and the task type are called so by PEFT's messages."""
    return name in message or {"r": "`r`", "task_type": "task type"}.get(name, name) in message


@pytest.mark.parametrize("name", NAMES)
def test_every_field_with_values_of_every_type(name):
    refused = []
    for value in VALUES:
        message = tried(lambda value=value: DoraConfig(**{"target_modules": ["up"], name: value}))
        if message is not None:
            assert names(message, name), message
            assert "\n" not in message
            refused.append(value)
    # of a peft_type our own takes the place
    assert bool(refused) == (name != "peft_type")


@pytest.mark.parametrize("reader", [DoraConfig, PeftConfig])
@pytest.mark.parametrize("name", NAMES)
def test_every_entry_of_a_file_with_values_of_every_type(name, reader, tmp_path):
    """What the constructor refuses a file may not hold either, and the message names the folder."""
    DoraConfig(target_modules=["up"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    before = json.loads(file.read_text())
    own = before["auto_mapping"][MARKER]
    refused = 0
    for value in VALUES:
        entries = before | {"auto_mapping": {MARKER: own | {name: value}}} if name in own else before | {name: value}
        file.write_text(json.dumps(entries))
        message = tried(lambda: reader.from_pretrained(str(tmp_path)))
        refused += message is not None
        if message is not None:
            assert names(message, name) or "type" in message, message
            assert str(tmp_path) in message or reader is PeftConfig
    # without our mark in auto_mapping the folder is plain PEFT's, which takes anything
    assert refused or (name, reader) == ("auto_mapping", PeftConfig)


@pytest.mark.parametrize("value", [5, "text", [1], True])
@pytest.mark.parametrize("reader", [DoraConfig, PeftConfig])
def test_our_own_entries_are_a_dictionary(reader, value, tmp_path):
    DoraConfig(target_modules=["up"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_mapping": {MARKER: value}}))
    with pytest.raises(ValueError, match=rf"auto_mapping\['{MARKER}'\] must be a dictionary, found"):
        reader.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("text", ["null", "5", "[]", '"text"', "", "{"])
@pytest.mark.parametrize("reader", [DoraConfig, PeftConfig])
def test_a_file_that_holds_no_entries(reader, text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"is not (a JSON object|JSON)"):
        reader.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("alpha", [-1, -0.5, float("inf"), float("nan"), "16", None, True])
def test_alpha(alpha):
    with pytest.raises(ValueError, match="lora_alpha must"):
        DoraConfig(lora_alpha=alpha)
    with pytest.raises(ValueError, match="alpha_pattern"):
        DoraConfig(alpha_pattern={"up": alpha})


def test_what_is_expected_is_said_in_words():
    with pytest.raises(
        ValueError, match=r"^rank_pattern must be a dictionary from strings to whole numbers, found True"
    ):
        DoraConfig(rank_pattern=True)
    with pytest.raises(ValueError, match=r"^lora_dropout must be a finite number, found None. The default is 0.0.$"):
        DoraConfig(lora_dropout=None)
    assert describe(list[tuple[int, int]] | None) == "a list of lists of 2 whole numbers or None"
    assert describe(Literal["a", "b"]) == "'a' or 'b'"


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (1, bool, False),
        (1, Literal[True], False),
        (("a",), list[str], True),
        ({"a"}, list[str], True),
        ("a", list[str], False),
        ([0, 1], tuple[int, int], True),
        ([0], tuple[int, int], False),
        ({"a": [1]}, dict[str, list[int]], True),
        ({1: [1]}, dict[str, list[int]], False),
        (None, str | None, True),
        (object(), object, True),
    ],
)
def test_fits(value, hint, expected):
    assert fits(value, hint) is expected
