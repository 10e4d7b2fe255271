"""Merging into files, shard by shard, against merging a loaded model: peak memory and time, and a run that is killed.

    python scripts/benchmark_merge.py                          # a synthetic LLaMA of 4 GB, all-linear, r = 16
    python scripts/benchmark_merge.py --gigabytes 0.05 --shard-gigabytes 0.01      # a toy, in a minute

Needs Linux, three times the model's size on the disk, and for the loaded model twice its size of memory. Each runs in
a process of its own: `dora-peft export --as merged`; `merge_and_unload().save_pretrained`; and the export again, which
is killed by SIGKILL when half of its files are finished, and started a second time. Expected result: the files of the
first two hold the same bits, those of the first and the last the same bytes; a table of seconds and of the largest
resident set, everything included; the same in scripts/benchmarks/results/merge.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import RESULTS
from common.arguments import positive
from common.files import write_json
from common.machine import describe_machine
from dora_peft import DoraConfig

GB = 10**9
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORKER = "--worker"


def config_of(gigabytes: float) -> LlamaConfig:
    """A LLaMA that takes about so many bytes in bf16; a narrow one if they are few."""
    hidden = 2048 if gigabytes >= 1 else 256
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "vocab_size": 16 * hidden}
    per_layer = (4 + 3 * 11 / 4) * hidden**2
    layers = max(1, round((gigabytes * GB / 2 - 2 * 16 * hidden**2) / per_layer))
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    return LlamaConfig(**sizes, **heads, num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16")


def shards_of(config: LlamaConfig, shard_bytes: float) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of all tensors, put into files of about so many bytes."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    taken = 0
    for name, parameter in model.named_parameters():
        nbytes = 2 * parameter.numel()
        if taken and taken + nbytes > shard_bytes:
            shards.append({})
            taken = 0
        shards[-1][name] = tuple(parameter.shape)
        taken += nbytes
    return shards


def make(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the base and an adapter over it; gives their sizes."""
    config, generator = config_of(options.gigabytes), torch.Generator().manual_seed(0)
    shards = shards_of(config, options.shard_gigabytes * GB)
    (folder / "base").mkdir()
    config.save_pretrained(folder / "base")
    where: dict[str, str] = {}
    adapter: dict[str, Tensor] = {}
    largest = total = 0
    for number, shapes in enumerate(shards, 1):
        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            weight = (
                torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[1] ** -0.5
            )
            tensors[name] = weight.bfloat16()
            largest, total = max(largest, tensors[name].nbytes), total + tensors[name].nbytes
            if name.split(".")[-2] in TARGETS:
                adapter.update(factors(name, tensors[name], options.rank, generator))
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / "base" / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "base" / "model.safetensors.index.json", index)
    DoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
    ).save_pretrained(folder / "adapter")
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    return {
        "gigabytes": total / GB, "files": len(shards), "largest_tensor_mib": largest / 2**20, "rank": options.rank,
        "hidden": config.hidden_size, "layers": config.num_hidden_layers,
    }  # fmt: skip


def factors(name: str, weight: Tensor, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A, B and m of a module: B A moves it by a percent, and m differs from its norm by one."""
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    out, columns = weight.shape
    norm = torch.linalg.vector_norm(weight.float(), dim=1)
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, columns, generator=generator) * columns**-0.5,
        f"{stem}.lora_B.weight": torch.randn(out, rank, generator=generator) * 0.01 * rank**-0.5,
        f"{stem}.lora_magnitude_vector.weight": norm * (1 + 0.01 * torch.randn(out, generator=generator)),
    }


def export_files(folder: Path, out: Path) -> None:
    from dora_peft.adapters.export import export

    export(folder / "adapter", folder / "base", out, "merged")


def merge_loaded(folder: Path, out: Path) -> None:
    from peft import PeftModel

    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype="auto")
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    merged.save_pretrained(out, max_shard_size="5GB")


WORKERS = {"files": export_files, "loaded": merge_loaded}


def start(name: str, folder: Path, out: Path) -> subprocess.Popen[str]:
    """A process that merges, and prints its figures as JSON at its end."""
    command = [sys.executable, __file__, WORKER, name, str(folder), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def peak_mib() -> float:
    """The largest resident set of this process so far; what rusage says includes that of the process before it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def work(name: str, folder: Path, out: Path) -> None:
    before = peak_mib()
    begin = time.perf_counter()
    WORKERS[name](folder, out)
    seconds = time.perf_counter() - begin
    print(json.dumps({"time_s": seconds, "peak_mib": peak_mib(), "before_mib": before}))


def figures(name: str, folder: Path, out: Path) -> dict[str, float]:
    """Run a worker to its end."""
    process = start(name, folder, out)
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"merging ({name}) failed with status {process.returncode}")
    found: dict[str, float] = json.loads(said.strip().splitlines()[-1])
    return found


def kill_at_half(folder: Path, out: Path, files: int) -> int:
    """Start an export, and kill it when half of its files are finished; gives how many were."""
    process = start("files", folder, out)
    manifest = out.with_name(f"{out.name}.partial") / "manifest.json"
    while process.poll() is None:
        finished = len(json.loads(manifest.read_text())["shards"]) if manifest.exists() else 0
        if finished >= files / 2:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            break
        time.sleep(0.01)
    if process.returncode != -signal.SIGKILL or out.exists():
        raise SystemExit(f"the export ended with status {process.returncode} before it could be killed")
    return len(json.loads(manifest.read_text())["shards"])


def tensors_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file is no dictionary
                yield key, file.get_tensor(key)


def check_tensors(one: Path, other: Path) -> int:
    """See that two folders hold the same tensors, whatever files they are in; gives their number."""
    where = (
        json.loads((other / "model.safetensors.index.json").read_text())["weight_map"]
        if (other / "model.safetensors.index.json").exists()
        else {}
    )
    count = 0
    for key, tensor in tensors_in(one):
        with safe_open(other / where.get(key, "model.safetensors"), framework="pt") as file:
            if not torch.equal(tensor.view(torch.int16), file.get_tensor(key).view(torch.int16)):
                raise SystemExit(f"'{key}' differs between {one.name} and {other.name}")
        count += 1
    if count != sum(1 for _ in tensors_in(other)):
        raise SystemExit(f"{one.name} and {other.name} hold other tensors")
    return count


def check_bytes(one: Path, other: Path) -> int:
    """See that two folders hold the same files byte for byte; gives their number."""
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        raise SystemExit(f"{one.name} and {other.name} hold other files")
    for name in names:
        with open(one / name, "rb") as a, open(other / name, "rb") as b:
            while block := a.read(2**24):
                if block != b.read(2**24):
                    raise SystemExit(f"{name} differs between {one.name} and {other.name}")
            if b.read(1):
                raise SystemExit(f"{name} differs between {one.name} and {other.name}")
    return len(names)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == [WORKER]:
        work(argv[1], Path(argv[2]), Path(argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the base in bf16")
    parser.add_argument("--shard-gigabytes", type=float, default=0.5, help="of each of its files")
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--folder", type=Path, help="where to make it all; default: the system's temporary folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        setting = make(folder, options)
        print(f"{setting['gigabytes']:.2f} GB in {setting['files']} files, {setting['layers']} layers", flush=True)
        results: dict[str, Any] = {"files": figures("files", folder, folder / "whole")}
        results["loaded"] = figures("loaded", folder, folder / "expected")
        results["equal_tensors"] = check_tensors(folder / "whole", folder / "expected")
        shutil.rmtree(folder / "expected")
        finished = kill_at_half(folder, folder / "again", setting["files"])
        results["resumed"] = {**figures("files", folder, folder / "again"), "finished_before": finished}
        results["equal_files"] = check_bytes(folder / "whole", folder / "again")
    for name in ("files", "loaded", "resumed"):
        found = results[name]
        print(f"{name:8} {found['time_s']:7.1f} s {found['peak_mib']:8.0f} MiB ({found['before_mib']:.0f} before)")
    print(f"{results['equal_tensors']} tensors equal those of merge_and_unload; killed after {finished} files and gone")
    print(f"on, all {results['equal_files']} files are the same bytes")
    path = options.results / "merge.json"
    options.results.mkdir(parents=True, exist_ok=True)
    threads = os.environ.get("OMP_NUM_THREADS")
    write_json(path, {**describe_machine(torch.device("cpu")), "omp": threads, "setting": setting, "merge": results})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
