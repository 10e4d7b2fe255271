"""What only a GPU can show: that kernels run, that nothing waits, graphs, torch.compile, several GPUs, streams."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator

import torch
from peft import get_peft_model
from torch import Tensor, nn

import dora_peft
from dora_peft.ops.constants import interpreted
from gpu.problem import BF16, FP16, FP32, Problem, distance, randn
from gpu.registry import Figures, Skipped


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skipped("it needs a GPU")


def kernel_names() -> set[str]:
    """The names of the package's kernels."""
    import triton

    folder = importlib.import_module("dora_peft.ops.kernels")
    names = set()
    for module in pkgutil.iter_modules(folder.__path__):
        for value in vars(importlib.import_module(f"{folder.__name__}.{module.name}")).values():
            if isinstance(value, triton.runtime.jit.KernelInterface):
                while not hasattr(value, "__name__"):
                    value = value.fn
                names.add(value.__name__)
    return names


def auto_takes_kernels(device: torch.device, figures: Figures) -> None:
    """Each kernel alone gives what torch gives, in every configuration, and so they compute here by default."""
    if device.type != "cuda" and not interpreted():
        raise Skipped("it needs a GPU, or Triton's interpreter")
    from dora_peft.ops.kernels import selfcheck

    for dtype in (FP32, BF16, FP16):
        for name, error in selfcheck.run_each(device, dtype):
            label = f"{name} in {str(dtype).removeprefix('torch.')}"
            if error is not None:
                label += f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            figures.require(label, error is None)
    if device.type != "cuda":
        return
    with dora_peft.implementation("auto"):
        problem = Problem(device, BF16)
        problem.run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            problem.run()
            torch.cuda.synchronize(device)
    ran = {event.name for event in profile.events()} & kernel_names()
    figures.require("kernels ran", bool(ran))


def nothing_waits(device: torch.device, figures: Figures) -> None:
    """No step synchronises with the host, with and without dropout."""
    needs_gpu(device)
    for p in (0.0, 0.1):
        problem = Problem(device, BF16, FP32, dropout=p)
        problem.run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            problem.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        figures.require(f"p={p}", True)


def captured(problem: Problem) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, dict[str, Tensor]]]:
    """A graph of one forward and backward pass, and what it writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            problem.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = problem.run()
    return graph, results


def graph_replays(device: torch.device, figures: Figures) -> None:
    """With another input and another B, whose norm the graph has to compute anew; with dropout, other masks."""
    needs_gpu(device)
    problem = Problem(device, BF16, FP32)
    graph, results = captured(problem)
    with torch.no_grad():
        problem.x.copy_(randn(*problem.x.shape, seed=9, device=device))
        problem.trained()[1].mul_(1.5)
    graph.replay()
    torch.cuda.synchronize(device)
    problem.compare(figures, results)
    graph, (y, _) = captured(Problem(device, BF16, FP32, dropout=0.5))
    graph.replay()
    first = y.clone()
    graph.replay()
    figures.require("dropout: finite", bool(y.isfinite().all()))
    figures.require("dropout: another mask in each replay", not torch.equal(first, y))


def compiled(device: torch.device, figures: Figures) -> None:
    """torch.compile takes the layer without a break, and computes the same."""
    needs_gpu(device)
    problem = Problem(device, BF16, FP32)
    model = torch.compile(problem.model.base_model.model, fullgraph=True)
    problem.compare(figures, problem.run(model))


def two_devices(device: torch.device, figures: Figures) -> None:
    """As device_map="auto" spreads a model: kernels of the second GPU's layers are launched there."""
    needs_gpu(device)
    if torch.cuda.device_count() < 2:
        raise Skipped(f"it needs two GPUs, and {torch.cuda.device_count()} is there")
    other = torch.device("cuda", 1 if (device.index or 0) == 0 else 0)
    figures.require("another device is current", torch.cuda.current_device() != other.index)
    problem = Problem(other, BF16, FP32)
    problem.compare(figures)
    with torch.no_grad():
        problem.trained()[1].mul_(1.5)
    problem.compare(figures, label="after a refresh: ")
    # a layer of each in one model
    model = nn.Sequential(nn.Linear(64, 64).to(device), nn.Linear(64, 64).to(other))
    config = dora_peft.DoraConfig(r=16, target_modules=["0", "1"], init_lora_weights=False)
    spread = get_peft_model(model, config).base_model.model
    x = randn(96, 64, seed=1, device=device)
    y = spread[1](spread[0](x).to(other))
    together = spread.to(device)
    figures.add("spread over both", distance(y.to(device), together[1](together[0](x))), 1e-5)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every fresh buffer is full of NaN."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # an error for cuBLAS otherwise, unless the environment names a workspace
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def poisoned_memory(device: torch.device, figures: Figures) -> None:
    """Nothing reads what nothing wrote."""
    with poisoned():
        figures.require("it is poisoned", bool(torch.empty(8, device=device).isnan().all()))
        for p in (0.0, 0.5):
            problem = Problem(device, BF16, FP32, dropout=p)
            y, gradients = problem.run()
            figures.require(f"y, p={p}", bool(y.isfinite().all()))
            for name, gradient in gradients.items():
                figures.require(f"d{name}, p={p}", bool(gradient.isfinite().all()))
        problem = Problem(device, BF16, FP32)
        problem.compare(figures)


def repeated_and_on_a_stream(device: torch.device, figures: Figures) -> None:
    """The same bits every time, on another stream as well."""
    problem = Problem(device, BF16, FP32)
    y, gradients = problem.run()
    runs = {"again": problem.run()}
    if device.type == "cuda":
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            runs["on a stream"] = problem.run()
        torch.cuda.current_stream(device).wait_stream(side)
    for label, (again, others) in runs.items():
        figures.require(f"y {label}", torch.equal(y, again))
        for name, gradient in others.items():
            figures.require(f"d{name} {label}", torch.equal(gradients[name], gradient))
