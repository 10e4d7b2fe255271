"""Gates and the check's outcome: what automatic falls back for, what it says, and how often."""

import platform
import threading
import warnings

import pytest
import torch

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import dora_peft
from dora_peft.ops import choice, passed
from dora_peft.ops import selfcheck as subject
from dora_peft.ops.kernels.checking import KernelMismatch

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)
FP32, BF16 = torch.float32, torch.bfloat16


def warned_of(device=GPU, *dtypes):
    """The one warning that a first question gives, and no other that follows it."""
    with pytest.warns(UserWarning, match="torch's operations") as caught:
        assert subject.obstacle(device, dtypes or (FP32,)) is not None
    assert len(caught) == 1
    # any warning is an error in these tests
    assert subject.obstacle(device, dtypes or (FP32,)) is not None
    return str(caught[0].message)


def test_a_gpu_that_gives_what_torch_gives_is_used_in_silence(gpu):
    assert subject.obstacle(GPU, (FP32,)) is None
    assert gpu.runs == [(GPU, FP32)]


@pytest.mark.parametrize(
    ("capability", "version", "hip", "reason"),
    [
        ((7, 5), "3.6.0", None, "compute capability 8.0 and above, it has 7.5"),
        ((9, 0), "3.6.0", "6.3", "have not run on an AMD GPU yet"),
        ((9, 0), "3.1.0", None, "Triton 3.2 to 3.7, found 3.1.0"),
        ((9, 0), "3.8.0+git1", None, r"Triton 3.2 to 3.7, found 3.8.0\+git1"),
        ((9, 0), "4.0.0", None, "found 4.0.0"),
    ],
)
def test_what_nobody_has_tried_is_refused_unless_it_is_asked_for(gpu, monkeypatch, capability, version, hip, reason):
    gpu.capability = capability
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(passed, "version", lambda module: version)
    with pytest.warns(UserWarning, match=rf"{reason}.*DORA_PEFT_KERNELS=1 checks.*DORA_PEFT_KERNELS=0 to choose this"):
        assert subject.obstacle(GPU, (FP32,))
    assert gpu.runs == []
    assert subject.obstacle(GPU, (FP32,), asked=True) is None
    monkeypatch.setenv(subject.VARIABLE, "1")
    assert subject.obstacle(GPU, (FP32,)) is None
    assert gpu.runs == [(GPU, FP32)]


@pytest.mark.parametrize("version", ["3.2.0", "3.4.1+git77", "3.7.1"])
def test_tested_versions_pass(gpu, monkeypatch, version):
    monkeypatch.setattr(passed, "version", lambda module: version)
    assert subject.obstacle(GPU, (FP32,)) is None


def test_the_version_that_the_tests_run_with_is_a_tested_one(gpu):
    assert subject._gate(GPU) is None


def test_what_is_asked_for_is_checked_all_the_same(gpu, monkeypatch):
    monkeypatch.setenv(subject.VARIABLE, "1")
    gpu.failure = KernelMismatch("the check of kernel a found that b is off by 1")
    message = warned_of()
    assert "the check of kernel a found that b is off by 1. Set the environment variable" in message
    monkeypatch.setattr(subject, "has_triton", lambda: False)
    assert "Triton is not installed" in warned_of()


def test_who_compares_all_results_gets_the_kernels_unchecked(gpu, monkeypatch):
    """Who asks for them by name: automatic stays careful, and where the user wants none there are none."""
    gpu.failure = KernelMismatch("the check of kernel a found that b is off by 1")
    with subject.trusting(), dora_peft.implementation("triton"):
        assert choice.uses_kernels(GPU, FP32, BF16)
        assert not subject.has_to_run(GPU, (FP32,), asked=True)
        assert gpu.runs == []
        assert "b is off by 1" in warned_of()
        monkeypatch.setenv(subject.VARIABLE, "0")
        assert "DORA_PEFT_KERNELS is 0" in subject.obstacle(GPU, (FP32,), asked=True)
        monkeypatch.delenv(subject.VARIABLE)
    assert gpu.runs == [(GPU, FP32)]
    with pytest.raises(RuntimeError, match=r"'triton'.*b is off by 1"):
        dora_peft.implementation("triton")


def test_never_means_never_and_nothing_is_said(gpu, monkeypatch):
    monkeypatch.setenv(subject.VARIABLE, "0")
    assert subject.obstacle(GPU, (FP32,))
    assert gpu.runs == []
    with pytest.raises(RuntimeError, match=r"'triton'.*DORA_PEFT_KERNELS is 0"):
        dora_peft.implementation("triton")


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_another_setting_is_an_error_wherever_layers_compute(gpu, monkeypatch, device):
    monkeypatch.setenv(subject.VARIABLE, "yes")
    with (
        dora_peft.implementation("auto"),
        pytest.raises(ValueError, match=r"DORA_PEFT_KERNELS must be 0 .* found 'yes'"),
    ):
        choice.uses_kernels(torch.device(device), FP32)


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        torch.OutOfMemoryError("CUDA out of memory."),
        AssertionError(),
        ImportError("libcuda.so cannot found!\nPossible files are located at ..."),
    ],
)
def test_whatever_the_check_raises_is_said_once_and_torch_computes(gpu, failure, tmp_path):
    gpu.failure = failure
    message = warned_of()
    assert f"not by its own kernels: {type(failure).__name__}: " in message
    assert str(failure).partition("\n")[0].rstrip(".") in message
    assert "Set the environment variable DORA_PEFT_KERNELS=0 to choose this without a warning." in message
    # the same for another dtype is not said again; another device has its own warning
    assert subject.obstacle(GPU, (BF16,))
    assert "on cuda:1" in warned_of(OTHER)
    assert gpu.runs == [(GPU, FP32), (GPU, BF16), (OTHER, FP32)]
    assert not list(tmp_path.rglob("*.json"))


def test_triton_that_cannot_be_imported_is_a_reason(gpu, monkeypatch):
    def fails(module):
        raise OSError("libstdc++.so.6: version not found")

    monkeypatch.setattr(passed, "version", fails)
    assert "Triton cannot be imported (OSError: libstdc++" in warned_of()


def test_one_dtype_may_fail_alone(gpu):
    gpu.failure = {BF16: KernelMismatch("the check of kernel a in bfloat16 found that b is off by 1")}
    assert subject.obstacle(GPU, (FP32,)) is None
    assert "in bfloat16" in warned_of(GPU, FP32, BF16)
    assert subject.obstacle(GPU, (FP32, torch.float16)) is None


def test_an_interruption_is_not_swallowed_and_decides_nothing(gpu):
    gpu.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        subject.obstacle(GPU, (FP32,))
    gpu.failure = None
    assert subject.obstacle(GPU, (FP32,)) is None
    assert len(gpu.runs) == 2


def test_a_gpu_that_answers_no_more_is_an_error_that_says_what_to_do(gpu):
    gpu.failure, gpu.lost = RuntimeError("an illegal memory access was encountered"), True
    with pytest.raises(RuntimeError, match=r"cuda:0 unusable.*illegal memory access.*DORA_PEFT_KERNELS=0"):
        subject.obstacle(GPU, (FP32,))


def test_a_warning_that_is_an_error_leaves_the_decision(gpu):
    gpu.failure = RuntimeError("no")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="RuntimeError: no"):
            subject.obstacle(GPU, (FP32,))
    assert subject.obstacle(GPU, (FP32,)) == "RuntimeError: no"
    assert len(gpu.runs) == 1


def test_two_threads_check_once(gpu, monkeypatch):
    entered, go_on = threading.Event(), threading.Event()
    run = gpu.run

    def slow(device, dtype):
        entered.set()
        assert go_on.wait(30)
        run(device, dtype)

    from dora_peft.ops.kernels import selfcheck as kernels_check

    monkeypatch.setattr(kernels_check, "run", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(subject.obstacle(GPU, (FP32,)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert entered.wait(30)
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [None, None]
    assert gpu.runs == [(GPU, FP32)]


@pytest.mark.gpu
def test_this_gpus_kernels_are_right(monkeypatch, tmp_path):
    """Without what is remembered, and without a warning, which is an error here."""
    for name, empty in ("_known", {}), ("_warned", set()):
        monkeypatch.setattr(subject, name, empty)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert subject.obstacle(GPU, (FP32, BF16, torch.float16)) is None
    assert len(list(tmp_path.rglob("*.json"))) == 3


def test_what_passed_is_remembered_for_the_next_process(gpu, tmp_path):
    assert subject.obstacle(GPU, (FP32,)) is None
    assert len(list(tmp_path.rglob("*.json"))) == 1
    gpu.forget()
    assert subject.obstacle(GPU, (FP32, BF16)) is None
    assert gpu.runs == [(GPU, BF16)]
    gpu.forget()
    gpu.name = "Another GPU"
    assert subject.obstacle(GPU, (FP32,)) is None
    assert gpu.runs == [(GPU, FP32)]
