"""What is told from an adapter's tensors and config alone."""

import json
from pathlib import Path

import pytest
import torch

from dora_peft.adapters import doctor_files
from dora_peft.adapters.doctor_files import (
    flat_scales,
    of_numbers,
    of_tensors,
    says_dora,
    stems_of,
    without_input_scales,
)
from dora_peft.adapters.formats import Source

MAGNITUDES = ["lora_magnitude_vector", "lora_magnitude_vector.weight", "weight_m_wdecomp.weight"]
MAGNITUDES += ["dora_scale", "magnitude", "m"]


def source(tensors, config=None, **metadata):
    return Source(Path("adapter"), tensors, metadata, config)


def names(findings):
    return [finding.name for finding in findings]


@pytest.mark.parametrize(
    "key",
    [
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "weight_m_wdecomp.weight",
        "dora_scale",
        "magnitude",
        "m",
    ],
)
def test_magnitudes_of_every_format_in_low_precision(key):
    assert names(of_tensors(source({f"a.{key}": torch.ones(2, 1, dtype=torch.bfloat16)}))) == [
        "low-precision-magnitudes"
    ]
    assert names(of_tensors(source({f"a.{key}": torch.ones(2, 1)}))) == []
    assert names(of_tensors(source({"a.lora_A.weight": torch.ones(2, 1, dtype=torch.bfloat16)}))) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2])
def test_tensors_that_are_not_finite(dtype):
    bad = torch.tensor([1.0, float("inf")]).to(dtype)
    assert names(of_tensors(source({"a.lora_A.weight": bad}))) == ["not-finite"]
    assert names(of_tensors(source({"a.lora_A.weight": torch.ones(2, dtype=torch.int32)}))) == []


def test_scales_of_one_dimension():
    tensors = {
        "lora_a.dora_scale": torch.ones(4), "lora_a.lora_up.weight": torch.ones(4, 1),
        "lora_b.dora_scale": torch.ones(3), "lora_b.lora_up.weight": torch.ones(4, 1),
        "lora_c.dora_scale": torch.ones(4, 1),
    }  # fmt: skip
    assert flat_scales(source(tensors)) == ["lora_a.dora_scale", "lora_b.dora_scale"]
    # 3 numbers cannot be those of 4 output rows
    assert tensors.keys() - without_input_scales(source(tensors)).tensors.keys() == {"lora_b.dora_scale"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("entry", ["r", "lora_alpha", "rank_pattern", "lora_parameters"])
def test_numbers_of_the_config(entry, value):
    nested = entry in ("rank_pattern", "lora_parameters")
    (finding,) = of_numbers(source({}, {entry: {"scale": value} if nested else value}))
    assert finding.name == "not-finite"
    assert entry in finding.found
    assert names(of_numbers(source({}, {entry: {"scale": 4} if nested else 4}))) == []


def test_numbers_in_the_head_of_diffusers_files():
    head = json.dumps({"unet.lora_alpha": float("inf")})
    assert names(of_numbers(source({}, lora_adapter_metadata=head))) == ["not-finite"]


@pytest.mark.parametrize(
    ("config", "dora"),
    [
        ({"use_dora": True}, True),
        ({"peft_type": "DORA"}, True),
        ({"fine_tune_type": "dora"}, True),
        ({"use_dora": "no"}, False),
        ({}, False),
    ],
)
def test_what_calls_itself_dora(config, dora):
    assert says_dora(config) is dora


def test_tensors_by_module():
    tensors = {
        "base_model.model.a.b.lora_A.weight": torch.ones(1), "a.b.lora_magnitude_vector": torch.ones(1),
        "c.lora_embedding_B": torch.ones(1), "lm_head.weight": torch.ones(1),
    }  # fmt: skip
    found = {path: set(parts) for path, parts in stems_of(source(tensors)).items()}
    assert found == {"a.b": {"lora_A", "lora_magnitude_vector"}, "c": {"lora_embedding_B"}}


def test_every_finding_of_a_file_says_what_to_do():
    bad = {"a.dora_scale": torch.full((2,), float("nan"), dtype=torch.float16)}
    found = [*of_tensors(source(bad)), *of_numbers(source({}, {"r": float("nan")}))]
    assert len(found) == 4
    assert all(finding.found.endswith(".") and finding.mend.endswith(".") for finding in found)
    assert doctor_files.RESTORE in {finding.mend for finding in found}
