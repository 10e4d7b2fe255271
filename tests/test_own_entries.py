"""A DoraConfig's entries as LoraConfig has them: what is packed for it, and what is put back."""

from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.config import LoraGAConfig
from torch import nn

from dora_peft import DoraConfig
from dora_peft._own_entries import MARKER, ROW_RECORDS, entries_of, jsonable, pack, union


def values(config):
    return asdict(config)


def matched(targets):
    """The modules that PEFT adapts for these target modules."""
    model = nn.ModuleDict(
        {block: nn.ModuleDict({name: nn.Linear(4, 4) for name in ("up", "down", "gate", "up2")}) for block in "ab"}
    )
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=targets))
    return {n for n, m in adapted.base_model.model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("first", [{"up"}, {"a.up", "gate"}, r".*\.up", r"a\.(up|gate)"])
@pytest.mark.parametrize("second", [{"down"}, {"b.gate", "b.down"}, r"b\..*", r".*\.up2"])
def test_a_union_matches_what_either_matches(first, second):
    found = matched(union(first, second))
    assert found == matched(first) | matched(second) == matched(union(second, first))
    assert matched(first) < found


def test_a_union_with_nothing():
    assert union({"up"}, None) == union(None, {"up"}) == {"up"}
    assert union("up", set()) == "up"
    assert union(None, None) is None


def test_jsonable():
    assert jsonable({"b", "a"}) == ["a", "b"]
    assert jsonable(LoraGAConfig(scale="gd"))["scale"] == "gd"
    assert jsonable(["b", "a"]) == ["b", "a"]
    assert jsonable(None) is None


@pytest.mark.parametrize("value", [5, "text", [1], True])
def test_entries_are_a_dictionary(value):
    with pytest.raises(ValueError, match=r"^name must be a dictionary, found .*Save or download"):
        entries_of(value, "name")
    assert entries_of(None, "name") == {}
    assert entries_of({"a": 1}, "name") == {"a": 1}
    with pytest.raises(ValueError, match=rf"auto_mapping\['{MARKER}'\] must be a dictionary"):
        DoraConfig(auto_mapping={MARKER: value})


def test_what_is_packed():
    config = DoraConfig(target_modules=["up"], magnitude_only_modules=["down"], init_lora_weights="orthogonal", r=4)
    config.auto_mapping = {"parent_library": "nets"}
    out = pack(config)
    own = out["auto_mapping"].pop(MARKER)
    assert out["auto_mapping"] == {"parent_library": "nets"}
    assert (out["peft_type"], out["use_dora"]) == ("LORA", True)
    # changed for plain PEFT, and kept as it was
    assert (out["target_modules"], own["target_modules"]) == (["down", "up"], ["up"])
    assert (out["init_lora_weights"], own["init_lora_weights"]) == (True, "orthogonal")
    assert not own.keys() & set(ROW_RECORDS)
    assert not out.keys() & (DoraConfig.__dataclass_fields__.keys() - LoraConfig.__dataclass_fields__.keys())
    config.tied_rows = {"up": [[0, 1]]}
    assert pack(config)["auto_mapping"][MARKER]["tied_rows"] == {"up": [[0, 1]]}


@pytest.mark.parametrize("entry", ["target_modules", "rank_pattern", "magnitude_only_modules", "init_lora_weights"])
@pytest.mark.parametrize("value", [5, [1], {"up": "x"}])
def test_own_entries_of_wrong_types_are_named(entry, value):
    entries = DoraConfig(target_modules=["up"], magnitude_only_modules=["down"]).to_dict()
    entries["auto_mapping"][MARKER][entry] = value
    with pytest.raises(ValueError, match=rf"{entry}|positive integer"):
        DoraConfig(**entries)


def test_to_dict_is_read_with_what_was_changed_in_it():
    config = DoraConfig(
        r=4, target_modules=["up"], magnitude_only_modules=["down"], rank_pattern={"up": 2}, detach_norm=False
    )
    entries = config.to_dict()
    for change, expected in [
        ({"detach_norm": True}, {"detach_norm": True}),
        ({"magnitude_only_modules": None}, {"magnitude_only_modules": None}),
        ({"target_modules": ["gate"]}, {"target_modules": {"gate"}}),
        ({"target_modules": r".*\.gate"}, {"target_modules": r".*\.gate"}),
        ({"rank_pattern": {"up": 3}}, {"rank_pattern": {"up": 3}}),
        ({"init_lora_weights": False, "r": 8}, {"init_lora_weights": False, "r": 8}),
    ]:
        assert values(DoraConfig(**{**entries, **change})) == values(config) | expected, change


def test_an_entry_of_a_newer_package_is_named():
    entries = DoraConfig(target_modules=["up"]).to_dict()
    entries["auto_mapping"][MARKER]["something_new"] = 1
    with pytest.warns(UserWarning, match=r"something_new.*newer dora_peft"):
        DoraConfig(**entries)


def test_entries_of_plain_lora_are_refused():
    with pytest.raises(ValueError, match="use_dora=False: this class always is DoRA"):
        DoraConfig(**LoraConfig(target_modules=["up"]).to_dict())
    theirs = LoraConfig(r=3, target_modules=["up"], use_dora=True, use_rslora=True)
    assert DoraConfig(**theirs.to_dict()) == DoraConfig(r=3, target_modules=["up"], use_rslora=True)


def test_the_records_of_an_adapter_travel_with_to_dict():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("up", "down")})
    with torch.no_grad():
        model["up"].weight[1:3] = 0
    model = get_peft_model(model, DoraConfig(r=2, target_modules=["up"], magnitude_only_modules=["down"]))
    get_peft_model_state_dict(model)
    config = model.peft_config["default"]
    assert config.tied_rows == {"up": [[1, 3]]}
    again = DoraConfig(**config.to_dict())
    assert (again.tied_rows, again.filled_rows) == (config.tied_rows, config.filled_rows)
    assert again.magnitude_only_ranks == config.magnitude_only_ranks == {"^down": 1}
    with pytest.raises(ValueError, match=r"tied_rows.*of adapter_config\.json"):
        DoraConfig(auto_mapping={MARKER: {"tied_rows": [1]}})


@pytest.mark.parametrize("changed", [{"up": 2, "down": 3}, {}, {"up": 5}])
def test_ranks_that_were_changed_in_to_dict_are_kept(changed):
    config = DoraConfig(r=4, target_modules=["up", "down"], rank_pattern={"up": 2}, magnitude_only_modules=["gate"])
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("up", "down", "gate")})
    packed = get_peft_model(model, config).peft_config["default"].to_dict()
    records = {name: rank for name, rank in packed["rank_pattern"].items() if name.startswith("^")}
    assert records
    found = DoraConfig(**{**packed, "rank_pattern": {**changed, **records}})
    assert found.rank_pattern == changed
    assert found.magnitude_only_ranks == records
