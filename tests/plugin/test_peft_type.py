"""PeftType.DORA is a member of the enum as every other is."""

import copy
import pickle

import pytest
from peft import PeftType

from dora_peft.plugin.peft_type import add_peft_type


def test_dora_is_a_proper_member_of_the_enum():
    member = PeftType.DORA
    assert isinstance(member, PeftType)
    assert member is PeftType("DORA") is PeftType["DORA"] is PeftType("DORA")
    assert member in PeftType
    assert "DORA" in PeftType.__members__
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(set(PeftType)) == len(PeftType.__members__)
    assert (member.name, member.value) == ("DORA", "DORA")
    assert member == "DORA"
    assert hash(member) == hash("DORA")
    # as every other member does it
    for shown in (repr, str, format):
        assert shown(member) == shown(PeftType.LORA).replace("LORA", "DORA")


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(6))]
)
def test_the_member_survives_copies(clone):
    assert clone(PeftType.DORA) is PeftType.DORA


def test_the_other_members_are_unchanged():
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="NO_SUCH_TYPE"):
        PeftType("NO_SUCH_TYPE")


def test_adding_it_again_changes_nothing():
    before, member = list(PeftType), PeftType.DORA
    add_peft_type()
    assert list(PeftType) == before
    assert PeftType.DORA is member
