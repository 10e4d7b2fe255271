"""Which implementation computes, and what happens where one is not available."""

import pytest
import torch

import dora_peft
from dora_peft.ops import choice as subject

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_automatic_takes_kernels_on_a_gpu_only():
    with dora_peft.implementation("auto"):
        assert not subject.uses_kernels(CPU, torch.float32)
        assert subject.uses_kernels(GPU, torch.float32, torch.bfloat16)
        assert not subject.uses_kernels(GPU, torch.float32, torch.float64)
    for name in ("torch", "reference"):
        with dora_peft.implementation(name):
            assert not subject.uses_kernels(GPU, torch.float32)


def test_automatic_does_without_triton(monkeypatch):
    monkeypatch.setattr(subject, "_has_triton", lambda: False)
    with dora_peft.implementation("auto"):
        assert not subject.uses_kernels(GPU, torch.float32)


def test_an_explicit_choice_that_is_not_available_raises(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"'triton'.*no GPU.*Use 'auto' or 'torch'"):
        dora_peft.implementation("triton")
    monkeypatch.setattr(subject, "_has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"Triton is not installed; install dora-peft\[triton\]"):
        dora_peft.implementation("triton")


def test_the_interpreter_makes_it_available(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with dora_peft.implementation("triton"):
        assert subject.uses_kernels(CPU, torch.float32)
        assert not subject.uses_kernels(CPU, torch.float64)
