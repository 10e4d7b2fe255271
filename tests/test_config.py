"""DoraConfig: PEFT's names and defaults, what is refused, and what adapter_config.json says to PEFT and to us."""

import copy
import json
import pickle
import warnings
from dataclasses import MISSING, asdict, fields, replace

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from torch import nn

from dora_peft import DoraConfig
from dora_peft._own_entries import MARKER
from dora_peft._refused_fields import IGNORED, REFUSED
from dora_peft.plugin.configs import plain_peft_configs

OWN_FIELDS = {"detach_norm", "dropout_mode", "magnitude_only_modules", "magnitude_key"}
# set by PEFT or by the class itself, not by users
GIVEN_FIELDS = {"peft_type", "peft_version"}

# Together they move every field away from its default; several are needed because some fields exclude each other.
CONFIGS = {
    "plain": {
        "r": 4,
        "lora_alpha": 12,
        "lora_dropout": 0.1,
        "target_modules": ["up", "down"],
        "exclude_modules": ["head"],
        "fan_in_fan_out": True,
        "bias": "lora_only",
        "use_rslora": True,
        "modules_to_save": ["head"],
        "init_lora_weights": "gaussian",
        "rank_pattern": {"down": 2, "^up": 3},
        "alpha_pattern": {"up": 6.5},
        "trainable_token_indices": [1, 3],
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "revision": "abc",
        "base_model_name_or_path": "org/base",
        "auto_mapping": {"base_model_class": "Net", "parent_library": "nets"},
        "detach_norm": False,
        "dropout_mode": "paper",
        "magnitude_only_modules": ["gate"],
        "magnitude_key": "peft",
    },
    "layers": {
        "target_modules": ["up"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
        "layer_replication": [[0, 2], [1, 3]],
    },
    "token dict": {"target_modules": ["up"], "trainable_token_indices": {"embed": [0, 5]}},
    "regex": {"target_modules": r".*\.up", "exclude_modules": r".*\.0\.up", "magnitude_only_modules": r".*\.down"},
    "mixed kinds": {"target_modules": ["up", "a.b"], "magnitude_only_modules": r".*\.down"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear magnitudes": {"target_modules": ["up"], "magnitude_only_modules": "all-linear"},
    "loftq": {"target_modules": ["up"], "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "corda": {
        "target_modules": ["up"],
        "init_lora_weights": "corda",
        "corda_config": CordaConfig(corda_method="kpm", use_float16_for_covariance=True),
    },
    "lora_ga": {"target_modules": ["up"], "init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig(scale="gd")},
}


def values(config):
    """The fields of a config, sub-configs as dictionaries."""
    return asdict(config)


def default_of(field):
    return field.default_factory() if field.default is MISSING else field.default


def needs_no_scipy(options):
    """Skip a test of LoftQ where PEFT lacks what it needs."""
    if options.get("init_lora_weights") == "loftq":
        pytest.importorskip("scipy", reason="PEFT needs it for LoftQ: the extra `loftq` is not installed")


def made(options):
    needs_no_scipy(options)
    return DoraConfig(**options)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("reader", [DoraConfig, PeftConfig])
def test_round_trip(options, reader, tmp_path):
    config = made(options)
    config.save_pretrained(tmp_path)
    loaded = reader.from_pretrained(str(tmp_path))
    assert type(loaded) is DoraConfig
    before = values(config) | {"peft_version": loaded.peft_version}
    if options.get("init_lora_weights") == "loftq":
        # PEFT's own LoraConfig reads the sub-config back as a dictionary as well
        assert dict(before["loftq_config"]) == dict(loaded.loftq_config)
    assert values(loaded) == before


def test_the_round_trip_covers_every_field():
    covered = set()
    for options in CONFIGS.values():
        config = made(options)
        covered |= {f.name for f in fields(config) if getattr(config, f.name) != default_of(f)}
    assert covered | GIVEN_FIELDS == {f.name for f in fields(DoraConfig)}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_plain_peft_reads_the_json_without_a_warning(options, tmp_path):
    config = made(options)
    config.save_pretrained(tmp_path)
    with plain_peft_configs(), warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = PeftConfig.from_pretrained(str(tmp_path))
    assert type(plain) is LoraConfig
    assert plain.use_dora
    changed_for_peft = {"peft_type", "peft_version", "auto_mapping"}
    if config.magnitude_only_modules:
        changed_for_peft |= {"target_modules", "rank_pattern"}
    for name in {f.name for f in fields(DoraConfig)} - OWN_FIELDS - changed_for_peft:
        expected = values(config)[name]
        assert values(plain)[name] == expected, name


def test_the_folder_is_marked_where_plain_peft_does_not_look(tmp_path):
    DoraConfig(auto_mapping={"parent_library": "nets"}).save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(entries) <= {f.name for f in fields(LoraConfig)}
    assert set(entries["auto_mapping"]) == {"parent_library", MARKER}
    assert entries["auto_mapping"][MARKER].keys() >= OWN_FIELDS


def test_shared_fields_have_pefts_names_and_defaults():
    ours = {f.name: default_of(f) for f in fields(DoraConfig)}
    peft = {f.name: default_of(f) for f in fields(LoraConfig)}
    assert ours.keys() - peft.keys() == OWN_FIELDS
    # every LoraConfig field is either taken over, refused with a reason, or a companion of a refused one
    assert peft.keys() - ours.keys() == (REFUSED.keys() | IGNORED) & peft.keys()
    for name in ours.keys() & peft.keys():
        assert ours[name] == peft[name], name
    # and so they are after construction, where PEFT fills in sub-configs
    ours, theirs = values(DoraConfig()), values(LoraConfig())
    for name in (ours.keys() & theirs.keys()) - {"peft_type"}:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_without_meaning_is_refused_with_its_reason(name):
    on = {
        "use_dora": False,
        "alora_invocation_tokens": [1, 2],
        "target_parameters": ["experts.weight"],
        "megatron_config": {"a": 1},
        "runtime_config": {"ephemeral_gpu_offload": True},
    }.get(name, True)
    with pytest.raises(ValueError, match=name) as caught:
        DoraConfig(**{name: on})
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("name", sorted((REFUSED.keys() | IGNORED) & {f.name for f in fields(LoraConfig)}))
def test_a_field_without_meaning_is_accepted_at_pefts_default(name):
    value = True if name == "use_dora" else getattr(LoraConfig(), name)
    assert values(DoraConfig(**{name: value})) == values(DoraConfig())


@pytest.mark.parametrize("name", ["eva", "mica", "EVA"])
def test_an_initialisation_that_dora_cannot_have_is_refused(name):
    with pytest.raises(ValueError, match=f"init_lora_weights='{name}' is not available for DoRA: it "):
        DoraConfig(init_lora_weights=name)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bias": "some"}, "bias must be one of 'none', 'all', 'lora_only', found 'some'"),
        ({"dropout_mode": "base"}, "dropout_mode must be one of 'branch', 'paper', found 'base'"),
        ({"magnitude_key": "bare"}, "magnitude_key must be one of 'weight', 'peft', found 'bare'"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), found 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\), found -0.1"),
    ],
)
def test_a_value_out_of_range_names_what_is_allowed(options, named):
    with pytest.raises(ValueError, match=named):
        DoraConfig(**options)


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="rnak"):
        DoraConfig(rnak=4)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"up": 2}, "bias": "all"}])
def test_reads_what_peft_wrote_with_use_dora(options, tmp_path):
    theirs = LoraConfig(r=4, target_modules=["up"], use_dora=True, **options)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = DoraConfig.from_pretrained(str(tmp_path))
    shared = {f.name for f in fields(DoraConfig)} - OWN_FIELDS - GIVEN_FIELDS
    for name in shared:
        assert getattr(ours, name) == getattr(theirs, name), name
    # unmarked, so PEFT's own classes still read it as theirs
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is LoraConfig


def test_an_unknown_entry_of_a_newer_peft_is_named_only_where_it_is_on(tmp_path):
    LoraConfig(use_dora=True).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps(entries | {"use_something_new": False}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DoraConfig.from_pretrained(str(tmp_path))
    file.write_text(json.dumps(entries | {"use_something_new": True}))
    with pytest.warns(UserWarning, match="use_something_new"):
        DoraConfig.from_pretrained(str(tmp_path))


def test_plain_lora_is_refused(tmp_path):
    LoraConfig(target_modules=["up"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"plain LoRA .*peft\.LoraConfig") as caught:
        DoraConfig.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_another_method_is_refused_by_name(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["up"]}))
    with pytest.raises(ValueError, match="IA3"):
        DoraConfig.from_pretrained(str(tmp_path))


def test_magnitude_only_modules_become_targets_of_plain_peft(tmp_path):
    """Whatever the two are given as, PEFT must target what either names, with our rank for the magnitude-only ones."""

    def wrapped_by(config):
        model = nn.Sequential()
        model.block = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("up", "down", "gate")})
        adapted = get_peft_model(model, config)
        return {n for n, m in adapted.base_model.model.named_modules() if hasattr(m, "lora_A")}, adapted

    for number, (targets, only) in enumerate(
        [(["up"], ["down"]), (["up"], r".*\.down"), (r".*\.up", ["down"]), (r".*\.up", r".*\.down"), (None, ["down"])]
    ):
        config = DoraConfig(r=2, target_modules=targets, magnitude_only_modules=only)
        ours, model = wrapped_by(config)
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        with plain_peft_configs():
            plain = PeftConfig.from_pretrained(str(folder))
        theirs, peft_model = wrapped_by(plain)
        assert theirs == ours == {f"block.{n}" for n in (("down",) if targets is None else ("up", "down"))}
        assert peft_model.get_submodule("base_model.model.block.down").r["default"] == 1
        if targets is not None:
            assert peft_model.get_submodule("base_model.model.block.up").r["default"] == 2


def test_to_lora_config_carries_the_shared_fields_without_use_dora():
    config = DoraConfig(**CONFIGS["plain"])
    lora = config.to_lora_config(r=5)
    assert not lora.use_dora
    assert lora.r == 5
    assert (lora.lora_alpha, lora.target_modules) == (config.lora_alpha, config.target_modules)


def test_init_weights_is_another_name(tmp_path):
    """PEFT sets `init_weights` when it converts PiSSA; it must reach the file."""
    config = DoraConfig(init_lora_weights="olora")
    assert config.init_weights == "olora"
    config.init_weights = True
    config.save_pretrained(tmp_path)
    assert DoraConfig.from_pretrained(str(tmp_path)).init_lora_weights is True


def test_the_magnitude_only_names_of_one_model_do_not_leak_into_the_next():
    config = DoraConfig(target_modules=["up"], magnitude_only_modules=["down"])
    for index in range(2):
        model = nn.Sequential()
        model.add_module(f"block{index}", nn.ModuleDict({name: nn.Linear(4, 4) for name in ("up", "down")}))
        get_peft_model(model, config)
        assert set(config.magnitude_only_ranks) == {rf"^block{index}\.down"}


def test_saving_a_loaded_config_writes_the_same_file(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("up", "down")})
    get_peft_model(model, DoraConfig(r=2, target_modules=["up"], magnitude_only_modules=["down"])).save_pretrained(
        tmp_path
    )
    DoraConfig.from_pretrained(str(tmp_path)).save_pretrained(tmp_path / "again")
    first, second = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, tmp_path / "again"))
    assert first == second


def as_lora(entries):
    """LoraConfig of these entries, and what it gives itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora = LoraConfig(**entries)
    return lora, lora.to_dict()


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_to_dict_is_read_by_both_classes(options):
    """Diffusers stores `to_dict()` as metadata, through JSON, and reads it by `LoraConfig(**...)`."""
    needs_no_scipy(options)
    config = DoraConfig(**options)
    before = values(config)
    for entries in (config.to_dict(), json.loads(json.dumps(config.to_dict()))):
        lora, theirs = as_lora(entries)
        assert lora.use_dora
        assert lora.target_modules == (set(names) if isinstance(names := entries["target_modules"], list) else names)
        # straight, by PEFT's class, and by PEFT's choice of one
        for again in (DoraConfig(**entries), DoraConfig(**theirs), PeftConfig.from_peft_type(**theirs)):
            assert type(again) is DoraConfig
            assert again == config
            assert again.to_dict() == config.to_dict()
    assert values(config) == before


def test_what_to_dict_gives_is_not_the_configs_own():
    config = DoraConfig(rank_pattern={"up": 2}, auto_mapping={"parent_library": "nets"}, target_modules=["up"])
    entries = config.to_dict()
    entries["rank_pattern"]["up"] = 99
    entries["auto_mapping"].clear()
    assert config.rank_pattern == {"up": 2}
    assert config.auto_mapping == {"parent_library": "nets"}
    entries = config.to_dict()
    DoraConfig(**entries)
    assert MARKER in entries["auto_mapping"]


@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), replace])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_copies_are_equal(options, travel):
    needs_no_scipy(options)
    config = DoraConfig(**options)
    config.tied_rows = {"up": [[0, 2]]}
    again = travel(config)
    assert type(again) is DoraConfig
    assert again == config
    assert asdict(again) == asdict(config)
    assert asdict(config).keys() == {f.name for f in fields(DoraConfig)}
    if travel is not replace:
        assert again.to_dict() == config.to_dict()
