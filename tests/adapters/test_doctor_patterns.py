"""Regular expressions of a config: matched as re does, named if they are none, and stopped if they never end."""

import re

import pytest

from dora_peft.adapters import doctor_patterns
from dora_peft.adapters.doctor_patterns import PatternError, is_plain, matching

NAMES = ["model.layers.0.q_proj", "model.layers.1.k_proj", "lm_head"]


@pytest.mark.parametrize(
    "pattern", ["lm_head", r".*\.(q|k)_proj", r"model\.layers\.[0-9]+\.q_proj", "nothing", "lm.head"]
)
def test_the_names_that_an_expression_matches_as_a_whole(pattern):
    assert matching([pattern], NAMES) == [{name for name in NAMES if re.fullmatch(pattern, name)}]


def test_several_at_once_keep_their_order():
    assert matching(["lm_head", ".*q_proj", "x"], NAMES) == [{"lm_head"}, {NAMES[0]}, set()]


@pytest.mark.parametrize("pattern", ["(", "[", "a{2,1}", "*"])
def test_what_is_no_expression(pattern):
    with pytest.raises(PatternError, match="is no regular expression"):
        matching([pattern], NAMES)


def test_what_never_ends(monkeypatch):
    monkeypatch.setattr(doctor_patterns, "SECONDS", 1.0)
    with pytest.raises(PatternError, match="does not come to an end within 1 seconds"):
        matching([r"(\w+\.?)+!"], ["a" * 60])


@pytest.mark.parametrize(("pattern", "plain"), [("q_proj", True), (r"^model\.x", True), ("a*", False), ("(a)", False)])
def test_plain_ones_need_no_process(pattern, plain, monkeypatch):
    assert is_plain(pattern) is plain
    monkeypatch.setattr(doctor_patterns.subprocess, "run", lambda *_, **__: pytest.fail("a process"))
    if plain:
        matching([pattern], NAMES)
    else:
        with pytest.raises(pytest.fail.Exception, match="a process"):
            matching([pattern], NAMES)
