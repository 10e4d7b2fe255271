"""What scripts/gpu.sh runs, in the order of what is worth most when the time ends early.

The seconds are predicted for an H100 from the work that a stage does, imports included; no GPU has measured them yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# All but the last of two equal options is overridden.
TOY = ["--model", "tiny", "--layers", "1", "--batch", "1", "--seq-len", "8", "--rank", "2", "--rounds", "2"]
TOY += ["--warmup", "1", "--accumulation", "1", "--new-tokens", "2", "--repeats", "1", "--contenders", "dora:triton"]
# What every stage needs besides its own.
ALWAYS = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes.

    Attributes:
        device: "cuda", or "cpu" for the rehearsal at toy size.
        results, reproduction: Folders of the results.
        work: Folder of caches, logs and what is remembered between calls.
        data: Folder of models and data.
    """

    device: str
    results: Path
    reproduction: Path
    work: Path
    data: Path = ROOT / "data"

    @property
    def toy(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Part:
    """One process of a stage: the words after `python`."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """Something that is measured or tested.

    Attributes:
        seconds: How long it is expected to take.
        limit: Seconds after which it is ended.
        parts: What runs, one after the other, or side by side if `parallel`.
        results: Patterns of files below `Places.results` or `Places.reproduction`; it is done if each matches one. A
            stage without any is done if its parts have run with these files, versions and GPU.
        needs: Packages without which it is skipped.
        always: Whether every call runs it.
        deterministic: Whether torch's deterministic algorithms are turned on in it, which asks for a setting of cuBLAS.
    """

    name: str
    seconds: int
    limit: int
    parts: tuple[Part, ...]
    results: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    parallel: bool = False
    always: bool = False
    deterministic: bool = False


def benchmark(places: Places, suite: str, model: str, tag: str, options: str) -> tuple[str, ...]:
    """The words of one run of scripts/benchmark.py."""
    words = [
        "scripts/benchmark.py",
        suite,
        "--device",
        places.device,
        "--model",
        model,
        "--tag",
        tag,
        "--dtype",
        "bf16",
    ]
    words += ["--results", str(places.results), "--resume", *options.split()]
    return (*words, *(TOY if places.toy else ()))


# name, seconds, limit, suite, model, options
LONG = "--batch 1 --seq-len 2048"
MAIN = "--contenders dora,frozen,lora_floor --rounds 7"
RECIPE = "--adapter-dtype bf16 --accumulation 8 --checkpointing non-reentrant --contenders dora --warmup 1"
BENCHMARKS: dict[str, tuple[int, int, str, str, str]] = {
    "step_8b_default": (80, 200, "step", "llama-3-8b", f"{LONG} {MAIN}"),
    "step_8b": (80, 200, "step", "llama-3-8b", f"--adapter-dtype bf16 {LONG} {MAIN}"),
    "step_3b_default": (50, 150, "step", "llama-3.2-3b", f"{LONG} {MAIN}"),
    "step_3b": (50, 150, "step", "llama-3.2-3b", f"--adapter-dtype bf16 {LONG} {MAIN}"),
    "rank_384": (70, 200, "step", "llama-3-8b", f"--layers 16 --rank 384 {LONG} {RECIPE} --rounds 5"),
    "qwen": (130, 300, "step", "qwen3-8b", f"--rank 384 --batch 1 --seq-len 4096 {RECIPE} --rounds 3"),
    "eval": (40, 120, "eval", "llama-3.2-3b", f"--adapter-dtype bf16 {LONG} {MAIN}"),
    "decode": (60, 150, "decode", "llama-3.2-3b", f"--adapter-dtype bf16 --new-tokens 32 {MAIN}"),
    "memory": (120, 250, "memory", "llama-3.2-3b", f"{LONG} --contenders dora --repeats 1"),
    "compiled": (
        150,
        350,
        "step",
        "llama-3.2-3b",
        f"--layers 8 --adapter-dtype bf16 --compile {LONG} --contenders dora",
    ),
}
# Settings whose kernels the stages after it need; one layer compiles what all of them run.
WARM = ("step_8b_default", "step_8b", "step_3b_default", "step_3b", "rank_384", "qwen", "eval")


def benchmark_stage(places: Places, name: str) -> Stage:
    seconds, limit, suite, model, options = BENCHMARKS[name]
    toy = " --no-peak" if places.toy and suite == "memory" else ""
    part = Part(name, benchmark(places, suite, model, name, options + toy))
    return Stage(
        name, seconds, limit, (part,), (f"{suite}_{'tiny' if places.toy else model}_{places.device}_{name}.json",)
    )


def warm_stage(places: Places) -> Stage:
    """Compile side by side what the benchmarks run: each of them with one layer, a small vocabulary and one round."""
    parts = []
    for name in WARM[: 2 if places.toy else None]:
        _, _, suite, model, options = BENCHMARKS[name]
        small = "--layers 1 --vocab 2048 --accumulation 1 --rounds 1 --warmup 1 --contenders dora"
        words = benchmark(
            places, suite, model, f"warm_{name}", f"{options} {small} --json {places.work}/warm/{name}.json"
        )
        parts.append(Part(name, words))
    return Stage("warm", 60, 200, tuple(parts), parallel=True)


def test_stage(places: Places) -> Stage:
    """The suite's tests of the kernels, a file at a time; only this package's warnings are errors."""
    files = sorted(path.relative_to(ROOT) for path in (ROOT / "tests" / "ops" / "kernels").glob("test_*.py"))
    files = [path for path in files if not places.toy or path.name == "test_operators.py"]
    ours = "filterwarnings=default\nerror:::dora_peft"
    common = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", ours, "-m", "gpu or not gpu")
    parts = tuple(Part(path.stem, (*common, str(path))) for path in files)
    return Stage("tests", 400, 480, parts, needs=("pytest",), deterministic=True)


def build_stages(places: Places) -> list[Stage]:
    """All stages in order."""
    device, results = places.device, str(places.results)
    check = ("scripts/check_gpu.py", "--device", device, "--results", results)
    log = ("--log", str(places.work / f"checks_{device}.jsonl"))
    toy_kernels = ["--tokens", "64", "--width", "48", "--rank", "4", "--rounds", "2"] if places.toy else []
    toy_qdora = ["--hidden", "64", "--layers", "1", "--vocab", "64", "--tokens", "8"] if places.toy else []
    toy_qdora += ["--rank", "2", "--rounds", "1"] if places.toy else []
    kernels = ("scripts/benchmark_kernels.py", "--device", device, "--results", results, *toy_kernels)
    qdora = ("scripts/benchmark_qdora.py", "--device", device, "--results", results, "--rounds", "3", *toy_qdora)
    memory = ("scripts/reproduce.py", "memory", "--size", "full", "--results", str(places.reproduction))
    memory += ("--dry_run",) if places.toy else ()
    stages = [
        Stage(
            "versions", 15, 60, (Part("versions", (*check, "--versions")),), (f"versions_{device}.json",), always=True
        ),
        Stage("checks", 120, 300, (Part("checks", (*check, *log)),)),
        warm_stage(places),
        Stage("kernels", 25, 100, (Part("kernels", kernels),), (f"kernels_{device}.json",)),
        *(benchmark_stage(places, name) for name in ("step_8b_default", "step_8b", "step_3b_default", "step_3b")),
        *(benchmark_stage(places, name) for name in ("rank_384", "qwen")),
        Stage("qdora", 150, 350, (Part("qdora", qdora),), (f"qdora_{device}.json",), needs=("bitsandbytes",)),
        *(benchmark_stage(places, name) for name in ("eval", "decode", "memory", "compiled")),
        Stage(
            "reproduce_memory",
            300,
            480,
            (Part("memory", memory),),
            (f"memory_full{'_dry' if places.toy else ''}.json",),
            needs=("matplotlib",),
        ),
        test_stage(places),
    ]
    if (places.data / "smollm2").is_dir() and not places.toy:
        grid = ("accuracy", "--tasks", "spelling", "cities", "--ranks", "2", "4", "8", "16", "32", "--num_rates", "3")
        words = ("scripts/reproduce.py", *grid, "--results", str(places.reproduction))
        part, needs = Part("accuracy", words), ("matplotlib", "scipy")
        stages.append(Stage("reproduce_accuracy", 480, 500, (part,), ("accuracy_laptop.json",), needs))
    return stages
