"""The benchmark: every suite at toy size, the check before timing, what counts as saved, resuming, and the table."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import benchmark
import update_readme
from benchmarks import footprint as benchmark_footprint
from benchmarks import measure as benchmark_measure
from benchmarks import report
from benchmarks.bases import SHAPES, Shape, build_base, build_layer
from benchmarks.contenders import Contender, build_contender, check_equal, find_linears, without_dropout
from benchmarks.options import read_options, result_path
from common.files import replacing
from common.memory import record_saved_bytes, saved_bytes

CPU = torch.device("cpu")
SMALL = ["--model", "tiny", "--device", "cpu", "--threads", "1", "--rounds", "1", "--warmup", "1", "--batch", "2"]
FLOAT = 4
# Triton's interpreter takes longer than all others together.
UNINTERPRETED = ("--contenders", ",".join(name for name in benchmark.DEFAULT if name != "dora:triton"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine threads that wait for each other make these tiny models up to fifty times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a suite at toy size, and return what it stored."""

    def run(suite: str, *flags: str) -> dict[str, Any]:
        path = tmp_path / "stored.json"
        benchmark.main([suite, *SMALL, "--seq-len", "16", "--json", str(path), *flags])
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        return json.loads(path.read_text(encoding="utf-8"))

    return run


def make(name: str, base: nn.Module, dropout: float = 0.0, **options: Any) -> Contender:
    options = {"adapter_dtype": torch.float32, "seed": 0, "rank": 4, **options}
    return build_contender(name, base, dropout=dropout, **options)


def tiny(dtype: torch.dtype = torch.float32) -> Any:
    return build_base(SHAPES["tiny"], 2, 128, dtype, CPU, 0)


def loss_of(contender: Contender) -> Tensor:
    ids = torch.arange(32).view(2, 16)
    return contender.call(input_ids=ids, labels=ids, use_cache=False).loss


def observe(contender: Contender) -> dict[str, Tensor]:
    with contender.context():
        loss = loss_of(contender)
        loss.backward()
    return {"loss": loss.detach(), **contender.gradients()}


def found_names(report: dict[str, Any]) -> list[str]:
    return list(report["results"][0]["contenders"])


# ---- suites


def test_step(measure: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    report = measure("step", "--rank", "4,8", "--dropout", "0,0.05", "--accumulation", "2", *UNINTERPRETED)
    settings = [(r["setting"]["rank"], r["setting"]["dropout"]) for r in report["results"]]
    assert settings == [(4, 0.0), (4, 0.05), (8, 0.0), (8, 0.05)]
    for result in report["results"]:
        assert {"lora", "peft_dora", "dora", "dora:torch", "dora:reference", "frozen", "lora_floor"} <= set(
            result["contenders"]
        )
        assert result["contenders"]["lora"]["ratio"] == 1
        for found in result["contenders"].values():
            assert len(found["values"]) == 1
            assert found["values"][0] > 0
        # each contender was compared with those that it has to equal, also where dropout is timed
        assert set(result["checked"]) == set(result["contenders"]) - {"lora", "peft_dora"}
        assert all(0 <= c["error"] <= c["allowed"] for c in result["checked"].values())
    assert {"device", "processor", "threads", "python", "versions", "commit", "options"} <= set(report)
    assert report["options"]["rank"] == [4, 8]
    assert "dora:reference" in capsys.readouterr().out


def test_all_contenders_run_unless_some_are_asked_for(measure: Callable[..., dict[str, Any]]) -> None:
    assert found_names(measure("step", "--seq-len", "4")) == benchmark.DEFAULT


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.parametrize("flags", [[], ["--adapter-dtype", "bf16"]])
def test_step_in_bf16_with_checkpointing(measure: Callable[..., dict[str, Any]], flags: list[str]) -> None:
    kinds = "none,reentrant,non-reentrant"
    names = "dora,frozen,lora_floor"
    report = measure("step", "--dtype", "bf16", *flags, "--checkpointing", kinds, "--contenders", names)
    assert [r["setting"]["checkpointing"] for r in report["results"]] == kinds.split(",")
    assert found_names(report) == ["lora", "peft_dora", "dora", "frozen", "lora_floor"]


def test_layer(measure: Callable[..., dict[str, Any]]) -> None:
    report = measure("layer", "--shapes", "8x12,12x8", "--contenders", "dora,frozen,lora_floor", "--dropout", "0.1")
    settings = [(r["setting"]["shape"], r["setting"]["part"]) for r in report["results"]]
    assert settings == [(s, p) for s in ("8x12", "12x8") for p in ("forward", "backward", "both")]
    forward, backward, both = (r["contenders"]["dora"]["median"] for r in report["results"][:3])
    assert both == pytest.approx(forward + backward)
    assert set(report["results"][0]["checked"]) == {"dora", "frozen", "lora_floor"}


@pytest.mark.parametrize(
    ("suite", "flags"), [("eval", []), ("decode", ["--contenders", "dora,frozen,lora_floor,peft_dora_cached"])]
)
def test_inference(measure: Callable[..., dict[str, Any]], suite: str, flags: list[str]) -> None:
    report = measure(suite, "--new-tokens", "3", *flags)
    (result,) = report["results"]
    assert {"peft_dora_cached", "dora", "frozen", "lora_floor"} <= set(result["checked"])


@pytest.mark.cached_norms
def test_refresh(measure: Callable[..., dict[str, Any]]) -> None:
    report = measure("refresh", "--shapes", "16x24", "--dtype", "bf16")
    error, known, recomputed, counts = report["results"]
    assert error["contenders"]["dora"]["median"] < 1e-5 < 1e-4 < error["contenders"]["peft_dora"]["median"]
    assert known["quantity"] == recomputed["quantity"] == "refresh_ms"
    assert known["reference"] == "peft_dora"
    # a forward pass and its recomputation for each of four micro-batches, against one in all
    assert {n: c["median"] for n, c in counts["contenders"].items()} == {"lora": 0, "peft_dora": 8, "dora": 1}


def test_memory(measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_footprint, "peak_of_process", lambda name, options, setting: float(len(name)))
    report = measure("memory", "--contenders", "dora,frozen,lora_floor", "--repeats", "2")
    saved = [r for r in report["results"] if r["quantity"] == "saved_mib"]
    peaks = [r for r in report["results"] if r["quantity"] == "peak_mib"]
    assert [(r["setting"]["dtype"], r["setting"]["adapter_dtype"], r["setting"]["checkpointing"]) for r in saved] == [
        (*dtypes, checkpointing)
        for dtypes in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))
        for checkpointing in ("none", "non-reentrant")
    ]
    assert [r["setting"]["checkpointing"] for r in peaks] == ["none", "non-reentrant"]
    assert peaks[0]["contenders"]["dora"]["values"] == [4.0, 4.0]
    for result in saved[::2]:
        figures = {name: found["median"] for name, found in result["contenders"].items()}
        assert 0 < figures["frozen"] < figures["lora_floor"] <= figures["lora"] < figures["peft_dora"]
    # what checkpointing keeps are the layers' inputs
    assert saved[1]["contenders"]["lora"]["median"] < saved[0]["contenders"]["lora"]["median"] / 4


def test_peak_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = read_options(["memory", *SMALL])
    setting = {"rank": 4, "dropout": 0.1, "batch": 2, "seq_len": 16, "dtype": "fp32", "adapter_dtype": "fp32"}
    setting["checkpointing"] = "non-reentrant"
    assert 0 < benchmark_footprint.peak_of_process("dora", options, setting) < 500
    monkeypatch.setattr(benchmark_footprint.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="dora: the benchmark's process ended with status 1"):
        benchmark_footprint.peak_of_process("dora", options, setting)


# ---- equal results


@pytest.mark.parametrize("suite", ["step", "layer", "eval", "decode", "memory"])
@pytest.mark.parametrize("wrong", ["dora", "lora_floor", "frozen"])
def test_a_wrong_contender_is_found(
    measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, suite: str, wrong: str
) -> None:
    def tampered(name: str, base: nn.Module, **options: Any) -> Contender:
        contender = build_contender(name, base, **options)
        if name == wrong:
            layers = [m for n, m in contender.module.named_modules() if n.endswith(("down_proj", "linear"))]
            layers[-1].register_forward_hook(lambda module, args, output: output * 1.05)
        return contender

    monkeypatch.setattr(benchmark_measure, "build_contender", tampered)
    flags = ["--shapes", "8x12"] if suite == "layer" else []
    with pytest.raises(RuntimeError, match=rf"^{wrong}: its [\w.]+ differs from that of (peft_dora|lora|base) by"):
        measure(suite, "--contenders", wrong, "--new-tokens", "2", "--no-peak", "--layers", "1", *flags)


def test_losses_must_stay_equal(measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that is right at first but does not learn what the others learn."""

    def lazy(contender: Contender, checkpointing: str) -> Any:
        optimizer = benchmark_measure.prepare_training(contender, checkpointing)
        if contender.name == "dora" and optimizer is not None:
            optimizer.param_groups[0]["lr"] = 0.5
        return optimizer

    monkeypatch.setattr("benchmarks.suites.prepare_training", lazy)
    with pytest.raises(RuntimeError, match=r"^dora: its last loss differs from that of peft_dora by"):
        measure("step", "--contenders", "dora")


def test_check_names_tensor_and_contender() -> None:
    right = {"loss": torch.tensor(1.0), "lora_A": torch.ones(3)}
    checked = check_equal({"peft_dora": right, "dora": right}, "fp32")
    assert checked["dora"]["error"] == 0
    with pytest.raises(RuntimeError, match=r"dora: its lora_A differs from that of peft_dora by nan"):
        check_equal({"peft_dora": right, "dora": {**right, "lora_A": torch.full((3,), torch.nan)}}, "fp32")
    with pytest.raises(RuntimeError, match=r"dora: only one of it and peft_dora has the tensors lora_A"):
        check_equal({"peft_dora": right, "dora": {"loss": torch.tensor(1.0)}}, "fp32")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_floor_computes_what_lora_computes(dropout: float) -> None:
    base, results = tiny(), {}
    for name in ("lora", "lora_floor"):
        contender = make(name, base, dropout)
        torch.manual_seed(0)  # the same masks
        results[name] = observe(contender)
    assert len(results["lora"]) == 1 + 2 * 2 * 7
    assert check_equal(results, "fp32")["lora_floor"]["error"] < 1e-5


def test_frozen_computes_what_lora_computes_without_adapter() -> None:
    base = tiny()
    frozen, lora = make("frozen", base), make("lora", base)
    assert not any(parameter.requires_grad for parameter in frozen.module.parameters())
    with lora.module.disable_adapter():
        assert torch.equal(loss_of(frozen), loss_of(lora))
    assert not torch.equal(loss_of(frozen), loss_of(lora))


def test_contenders_share_weights_and_adapters() -> None:
    base = tiny()
    pefts, ours = (make(name, base).module for name in ("peft_dora", "dora"))
    theirs = dict(pefts.named_parameters())
    assert len(theirs) > 40
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
        assert (parameter is theirs[name]) == (not parameter.requires_grad), name


def test_without_dropout_restores_it() -> None:
    module = nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 2))
    with without_dropout(module):
        assert module[0].p == 0
        assert module.training
    assert module[0].p == 0.3


@pytest.mark.parametrize("shape", [SHAPES["tiny"], Shape(32, 48, 4, 2, 1, 64, head_dim=16, qwen3=True)])
def test_layer_shapes_are_those_of_the_model(shape: Shape) -> None:
    model = build_base(shape, 1, 64, torch.float32, CPU, 0)
    assert sorted({(m.in_features, m.out_features) for _, m in find_linears(model)}) == shape.linears()


# ---- contenders that cannot run


def test_missing_triton_is_noted(measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def implementation(name: str) -> None:
        raise RuntimeError("no kernels here")

    monkeypatch.setattr("dora_peft.implementation", implementation)
    report = measure("layer", "--shapes", "8x12", "--contenders", "dora:triton")
    assert report["skipped"] == {"dora:triton": "RuntimeError: no kernels here"}
    assert found_names(report) == ["lora", "peft_dora"]


@pytest.mark.parametrize("compiler", [True, False])
def test_failing_compilation_is_noted(
    measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, compiler: bool
) -> None:
    def compile(model: nn.Module) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            raise TypeError("cannot compile this\nand more lines")

        return call

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("shutil.which", lambda name: name if compiler else None)
    report = measure("layer", "--shapes", "8x12", "--compile", "--contenders", "dora")
    reason = "TypeError: cannot compile this" if compiler else "torch.compile needs a C++ compiler on a CPU, found"
    assert list(report["skipped"]) == ["lora_compiled", "dora_compiled"]
    assert all(text.startswith(reason) for text in report["skipped"].values())
    assert found_names(report) == ["lora", "peft_dora", "dora"]


# ---- memory


def test_saved_bytes_of_a_sequence() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2)), torch.randn(8, 3)
    # The output of the sigmoid, which is the input of the second layer; x was there before.
    assert saved_bytes(lambda: model(x).sum()) == 8 * 5 * FLOAT


def test_saved_bytes_count_what_a_context_keeps() -> None:
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = [x.exp()]  # seen by no hook
            ctx.temporary = x.cos().sum().item()
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.kept[0]

    x = torch.randn(8, 3, requires_grad=True)
    assert saved_bytes(lambda: Keep.apply(x).sum()) == 8 * 3 * FLOAT
    with record_saved_bytes(nn.Identity()) as hooked:
        loss = Keep.apply(x).sum()
    assert sum(hooked.values()) == 0
    loss.backward()


def test_saved_bytes_agree_with_the_hooks_on_lora() -> None:
    """LoRA keeps everything through save_for_backward, so both ways of counting see the same."""
    lora = make("lora", tiny(), dropout=0.1)
    with record_saved_bytes(lora.module) as hooked:
        loss = loss_of(lora)
    loss.backward()
    ids = 2 * 16 * 8  # the tokens, which the second count leaves out as older than the forward pass
    assert abs(saved_bytes(lambda: loss_of(lora)) - sum(hooked.values())) <= 4 * ids


# ---- figures, files, options


def test_ratios_are_taken_within_a_round() -> None:
    values = {"lora": [1.0, 2.0, 4.0], "dora": [2.0, 2.0, 6.0]}
    found = benchmark_measure.summarize("time_ms", {}, values)["contenders"]["dora"]
    assert (found["q1"], found["median"], found["q3"]) == (2.0, 2.0, 4.0)
    assert (found["ratio_q1"], found["ratio"], found["ratio_q3"]) == (1.25, 1.5, 1.75)
    assert "ratio" not in benchmark_measure.summarize("time_ms", {}, {"dora": [1.0]})["contenders"]["dora"]


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or {"part": 0.001} for name in "abcd"}
    options = SimpleNamespace(seed=0, warmup=2, rounds=6)
    times = benchmark_measure.interleave(calls, options, "test")
    assert times == {"part": {name: [1.0] * 6 for name in "abcd"}}
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(rounds) == 8
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 2


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(path.parent.iterdir()) == []


def test_all_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machine = benchmark.describe_machine(CPU) | {"commit": "0" * 40, "modified": False}
    monkeypatch.setattr(benchmark, "describe_machine", lambda device: machine)
    monkeypatch.setattr(benchmark, "PLAN", ("layer --shapes 8x12", "layer --shapes 8x12 --rank 2 --tag r2"))
    flags = ["all", *SMALL, "--contenders", "dora", "--results", str(tmp_path)]
    benchmark.main(flags)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(files) == {f"layer_8x12_cpu{tag}.{kind}" for tag in ("", "_r2") for kind in ("json", "png")}
    capsys.readouterr()
    benchmark.main(flags)
    assert capsys.readouterr().out.count("is there already") == 2
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    for changed in (["--force"], ["--seed", "1"]):
        benchmark.main([*flags, *changed])
        assert "is there already" not in capsys.readouterr().out
    machine["commit"] = "1" * 40
    benchmark.main([*flags, "--seed", "1"])
    assert "is there already" not in capsys.readouterr().out


def test_the_plan_is_valid() -> None:
    paths = [result_path(read_options(planned.split())) for planned in benchmark.PLAN]
    assert len(set(paths)) == len(paths) > 8
    assert all(path.parent == report.RESULTS for path in paths)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["step", "--contenders", "lora,dorra"], "unknown contender 'dorra'"),
        (["step", "--rounds", "0"], "at least 1"),
        (["step", "--dropout", "0,1"], "found '1'"),
        (["step", "--checkpointing", "some"], "unknown checkpointing 'some'"),
        (["step", "--adapter-dtype", "bf16"], "needs --dtype bf16"),
        (["layer", "--shapes", "12"], "INxOUT"),
        (["stepp"], "invalid choice: 'stepp'"),
    ],
)
def test_wrong_options(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert message in capsys.readouterr().err


def test_a_layer_is_called_without_the_peft_model() -> None:
    base = build_layer(8, 12, torch.float32, CPU, 0)
    lora = make("lora", base, targets=["linear"])
    assert type(lora.call) is type(base)


@pytest.mark.cached_norms
def test_readme_table(measure: Callable[..., dict[str, Any]]) -> None:
    flags = ["--contenders", "dora,frozen,lora_floor"]
    memory = measure("memory", *flags, "--no-peak", "--checkpointing", "none")
    reports = [memory, measure("step", *flags), measure("refresh", "--shapes", "8x12")]
    lines = update_readme.benchmark_table(reports).splitlines()
    assert lines[2].startswith("| | PEFT LoRA | frozen base | LoRA floor | PEFT `use_dora` | dora_peft |")
    labels = [line.split("|")[1].strip() for line in lines[4:]]
    assert labels == [
        "training step: tiny, 2 layers, r=16, dropout 0, 2 x 16 tokens",
        "kept for backward: tiny, 2 layers, r=16, dropout 0, 2 x 16 tokens",
        "kept for backward: tiny, 2 layers, r=16, dropout 0, 2 x 16 tokens, bf16, adapter fp32",
        "kept for backward: tiny, 2 layers, r=16, dropout 0, 2 x 16 tokens, bf16",
        "norms per layer and optimizer step: tiny, 2 layers, r=16, 4 micro-batches, checkpointing",
    ]
    assert lines[-1].endswith("| 0 | - | - | 8 | 1 |")
    step = reports[1]["results"][0]["contenders"]
    assert lines[4].endswith(f" {step['peft_dora']['ratio']:.2f} | {step['dora']['ratio']:.2f} |")
    assert update_readme.benchmark_table([]) == ""


def test_readme_table_sets_compiled_against_compiled() -> None:
    result = {
        "quantity": "time_ms",
        "setting": {"rank": 16, "batch": 1, "seq_len": 8, "dtype": "fp32"},
        "contenders": {"lora": {"values": [4]}, "lora_compiled": {"values": [2]}, "dora_compiled": {"values": [3]}},
    }
    report = {"options": {"suite": "eval", "model": "tiny", "layers": 1}, "results": [result]}
    lines = update_readme.claim_lines(report, "eval", "time_ms", "evaluation", " ms")
    assert lines[0].endswith("| 4 ms | - | - | - | - |")
    assert lines[1] == "| evaluation, compiled: tiny, 1 layer, r=16, 1 x 8 tokens | 2 ms | - | - | - | 1.50 |"


def test_insert_leaves_the_rest_alone() -> None:
    text = "a\n<!-- table: x -->\nold\n<!-- end: x -->\nb\n"
    assert update_readme.insert(text, "x", "new") == text.replace("old", "new")
    assert update_readme.insert(text, "x", "") == text.replace("old\n", "")
    assert update_readme.insert(text, "y", "new") == text


# ---- the README's GPU table


def gpu_report(quantity: str, setting: dict[str, Any], **values: list[float]) -> dict[str, Any]:
    contenders = {name: {"values": found} for name, found in values.items()}
    result = {"quantity": quantity, "setting": setting, "contenders": contenders}
    return {"device": "Some GPU", "versions": {"torch": "1.2"}, "commit": "0123456789", "results": [result]}


def test_a_gpu_table_without_results_says_so() -> None:
    lines = update_readme.gpu_table({}).splitlines()[2:]
    assert len(lines) == len(update_readme.GPU_LINES)
    assert all(line.endswith("| not measured yet |") for line in lines)


def test_a_gpu_table_reads_what_was_measured() -> None:
    bf16 = {"checkpointing": "none", "dtype": "bf16", "adapter_dtype": "bf16"}
    table = update_readme.gpu_table(
        {
            "step_llama-3-8b_cuda_step_8b": gpu_report(
                "time_ms", bf16, lora=[2, 4, 8], dora=[1, 3, 6], peft_dora=[4, 8, 9]
            ),
            "memory_llama-3.2-3b_cuda_memory": gpu_report("peak_mib", bf16, lora=[100], dora=[109]),
            "step_qwen3-8b_cuda_qwen": gpu_report("time_ms", bf16, lora=[4000], dora=[5000], peft_dora=[13000]),
            "kernels_cuda": gpu_report("", {}) | {"gb_per_s": {"copy": 4000, "compose": 3600, "scale_and_sum": 3000}},
            "qdora_cuda": gpu_report("", {})
            | {"qdora": {n: {"time_ms": [t], "peak_mib": [p]} for n, t, p in [("qlora", 100, 50), ("qdora", 102, 51)]}},
        }
    )
    assert table.startswith("On Some GPU (torch 1.2, commit 012345678):")
    cells = [line.split(" | ")[-1].removesuffix(" |") for line in table.splitlines()[4:]]
    measured = [cell for cell in cells if cell != "not measured yet"]
    assert measured == ["0.75", "0.38", "5.00 s / 13.00 s", "1.09", "0.75", "1.02 and 1.02"]


def test_gpu_lines_are_of_stages(tmp_path: Path) -> None:
    """Each line's file is one that a stage of gpu.sh writes."""
    text = (Path(update_readme.ROOT) / "scripts" / "gpu.sh").read_text()
    for _, _, name, _ in update_readme.GPU_LINES:
        parts = name.split("_cuda")
        if parts[1]:
            suite, model = parts[0].split("_", 1)
            assert f"bench {suite} {model} {parts[1][1:]} " in text, name
        else:
            assert f"benchmark_{parts[0]}.py" in text, name
