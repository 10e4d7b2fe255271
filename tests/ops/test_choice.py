"""Which implementation computes, and what happens where one is not available."""

import platform

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import dora_peft
from dora_peft.ops import choice as subject
from dora_peft.ops import selfcheck

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FP32, BF16 = torch.float32, torch.bfloat16
needs_triton = pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")


@needs_triton
@pytest.mark.implementation("auto")
def test_automatic_takes_kernels_on_a_gpu_only(gpu):
    assert not subject.uses_kernels(CPU, FP32)
    assert subject.uses_kernels(GPU, FP32, BF16)
    assert subject.uses_kernels(torch.device("cuda"), FP32)
    assert not subject.uses_kernels(GPU, FP32, torch.float64)
    for name in ("torch", "reference"):
        with dora_peft.implementation(name):
            assert not subject.uses_kernels(GPU, FP32)
    assert subject.uses_kernels(GPU, FP32, BF16)


@needs_triton
@pytest.mark.implementation("auto")
def test_a_device_and_its_dtypes_are_decided_once(gpu, monkeypatch):
    for _ in range(3):
        assert subject.uses_kernels(GPU, FP32, BF16)
        assert subject.uses_kernels(GPU, BF16, BF16)
    assert gpu.runs == [(GPU, FP32), (GPU, BF16)]
    # and not even asked again
    monkeypatch.setattr(selfcheck, "obstacle", None)
    assert subject.uses_kernels(GPU, FP32, BF16)


@pytest.mark.implementation("auto")
def test_automatic_does_without_triton_in_silence(gpu, monkeypatch):
    monkeypatch.setattr(selfcheck, "has_triton", lambda: False)
    assert not subject.uses_kernels(GPU, FP32)


def test_an_explicit_choice_that_is_not_available_raises(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"'triton'.*no GPU.*Use 'auto' or 'torch'"):
        dora_peft.implementation("triton")
    monkeypatch.setattr(selfcheck, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"Triton is not installed \(pip install triton\)"):
        dora_peft.implementation("triton")


@needs_triton
def test_the_interpreter_makes_it_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with dora_peft.implementation("triton"):
        assert subject.uses_kernels(CPU, FP32)
        assert not subject.uses_kernels(CPU, torch.float64)


@needs_triton
def test_an_explicit_choice_raises_what_automatic_warns_of(gpu):
    gpu.failure = RuntimeError("Failed to find C compiler")
    with pytest.raises(RuntimeError, match=r"'triton'.*RuntimeError: Failed to find C compiler.*Use 'auto' or 'torch'"):
        dora_peft.implementation("triton")
    with (
        dora_peft.implementation("auto"),
        pytest.warns(UserWarning, match=r"torch's operations on cuda:0 \(A GPU\).*Failed to find C compiler"),
    ):
        assert not subject.uses_kernels(GPU, FP32)


@needs_triton
def test_an_explicit_choice_raises_where_a_dtype_is_first_used(gpu):
    gpu.failure = {BF16: RuntimeError("no bf16")}
    with dora_peft.implementation("triton"):
        assert subject.uses_kernels(GPU, FP32)
        with pytest.raises(RuntimeError, match=r"'triton'.*no bf16"):
            subject.uses_kernels(GPU, BF16, FP32)


@needs_triton
def test_an_explicit_choice_passes_the_gates_but_not_the_check(gpu):
    gpu.capability = (7, 5)
    with dora_peft.implementation("triton"):
        assert subject.uses_kernels(GPU, FP32)
    assert gpu.runs == [(GPU, FP32)]


@needs_triton
@pytest.mark.implementation("auto")
class TestWhereNothingCanBeTried:
    """A pass that is captured or traced before anything was decided takes torch's road, and decides nothing."""

    def test_during_capture(self, gpu):
        gpu.capturing = True
        assert not subject.uses_kernels(GPU, FP32)
        assert not subject.is_decided(GPU)
        assert gpu.runs == []
        gpu.capturing = False
        assert subject.uses_kernels(GPU, FP32)
        assert subject.is_decided(GPU)
        gpu.capturing = True
        assert subject.uses_kernels(GPU, FP32)

    @pytest.mark.parametrize(
        "trace", [torch.func.vmap, make_fx, lambda f: lambda x: torch.jit.trace(f, x, check_trace=False)]
    )
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_during_a_trace(self, gpu, trace):
        asked = []

        def traced(x):
            asked.append(subject.uses_kernels(GPU, FP32))
            return x + 1

        trace(traced)(torch.zeros(2))
        assert asked
        assert not any(asked)
        assert gpu.runs == []
        assert subject.uses_kernels(GPU, FP32)

    def test_what_needs_no_trial_is_answered_at_once(self, gpu):
        """A dtype that was checked for another question, and the user's own wish."""
        assert subject.uses_kernels(GPU, FP32, BF16)
        gpu.capturing = True
        assert subject.uses_kernels(GPU, BF16)
        assert subject.is_decided(GPU)

    def test_an_explicit_choice_is_followed(self, gpu):
        gpu.capturing = True
        with dora_peft.implementation("triton"):
            assert subject.uses_kernels(GPU, FP32)
        assert gpu.runs == []

    @pytest.mark.parametrize("right", [True, False])
    def test_a_compiled_graph_is_made_again_when_it_is_decided(self, gpu, right, monkeypatch):
        """By whatever is asked next about the device, here of another dtype, whose answer was known before."""
        # the compiler would save the random state of a GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        gpu.failure = None if right else {BF16: RuntimeError("no bf16")}
        assert subject.uses_kernels(GPU, FP32)
        traced = []

        @torch.compile(backend=lambda graph, _: traced.append(graph) or graph.forward)
        def compiled(x):
            return x + 1 if subject.uses_kernels(GPU, BF16, BF16) else x - 1

        x = torch.zeros(2)
        assert compiled(x)[0] == compiled(x)[0] == -1
        assert len(traced) == 1
        assert gpu.runs == [(GPU, FP32)]
        if right:
            assert subject.uses_kernels(GPU, FP32)
        else:
            with pytest.warns(UserWarning, match="no bf16"):
                assert subject.uses_kernels(GPU, FP32)
        assert gpu.runs == [(GPU, FP32), (GPU, BF16)]
        assert compiled(x)[0] == compiled(x)[0] == (1 if right else -1)
        assert len(traced) == 2
