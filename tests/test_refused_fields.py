"""Fields of LoraConfig without meaning for DoRA: refused with the reason, harmless at PEFT's default."""

import inspect
from dataclasses import dataclass, fields

import pytest
from peft import LoraConfig
from peft.tuners.lora.config import LoraRuntimeConfig

from dora_peft import DoraConfig
from dora_peft._refused_fields import IGNORED, REFUSED, REFUSED_INIT, refuse_foreign_fields

LORA = {f.name: f for f in fields(LoraConfig)}


@refuse_foreign_fields
@dataclass
class Small:
    """A config of its own."""

    r: int = 8


# Away from PEFT's defaults, by name; True for those that are not here.
ON = {
    "use_dora": False,
    "target_parameters": ["experts.weight"],
    "megatron_config": {"a": 1},
    "alora_invocation_tokens": [1],
    "runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True),
    "qalora_group_size": 7,
    "megatron_core": "another",
}


@pytest.mark.parametrize("name", sorted(REFUSED | IGNORED))
def test_a_field_that_is_on_is_refused_with_its_reason(name):
    value = ON.get(name, True)
    with pytest.raises(ValueError, match=f"does not take {name}=") as caught:
        Small(**{name: value})
    assert REFUSED[IGNORED.get(name, name)] in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", sorted((REFUSED | IGNORED).keys() & LORA.keys()))
def test_pefts_default_changes_nothing(name):
    value = True if name == "use_dora" else getattr(LoraConfig(), name)
    assert Small(r=3, **{name: value}) == Small(r=3)


@pytest.mark.parametrize("runtime", [None, {}, {"ephemeral_gpu_offload": False}, LoraRuntimeConfig()])
def test_a_runtime_config_without_offload_is_harmless(runtime):
    assert Small(runtime_config=runtime) == Small()
    with pytest.raises(ValueError, match=r"runtime_config=.*needs no such offload"):
        Small(runtime_config={"ephemeral_gpu_offload": True})


@pytest.mark.parametrize("value", [None, False, 1, "True"])
def test_use_dora_is_true(value):
    with pytest.raises(ValueError, match=r"use_dora=.*plain LoRA adapter is a peft\.LoraConfig"):
        Small(use_dora=value)


def test_the_classs_own_arguments_and_signature_stay():
    assert Small(5) == Small(r=5)
    assert list(inspect.signature(Small.__init__).parameters) == ["self", "r"]
    with pytest.raises(TypeError, match="unknown"):
        Small(unknown=1)


def test_every_field_and_every_reason_is_of_use():
    """A field that DoraConfig has cannot be refused as well, and a companion belongs to one that is refused."""
    own = {f.name for f in fields(DoraConfig)}
    assert not own & (REFUSED.keys() | IGNORED)
    assert set(IGNORED.values()) <= REFUSED.keys()
    assert LORA.keys() - own <= REFUSED.keys() | IGNORED
    assert all(len(reason) > 20 for reason in [*REFUSED.values(), *REFUSED_INIT.values()])


@pytest.mark.parametrize("init", sorted(REFUSED_INIT))
def test_an_initialisation_is_refused_in_any_case(init):
    for spelled in (init, init.upper()):
        with pytest.raises(ValueError, match=f"init_lora_weights='{spelled}'") as caught:
            DoraConfig(init_lora_weights=spelled)
        assert REFUSED_INIT[init] in str(caught.value)
