"""The benchmark's contenders: they compute the same, one that does not is found, and one that cannot run is noted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmark_fixtures import found_names, loss_of, make, tiny
from torch import Tensor, nn

from benchmarks import measure as benchmark_measure
from benchmarks.bases import SHAPES, Shape, build_base, build_layer
from benchmarks.contenders import Contender, build_contender, check_equal, find_linears, without_dropout

CPU = torch.device("cpu")


def observe(contender: Contender) -> dict[str, Tensor]:
    with contender.context():
        loss = loss_of(contender)
        loss.backward()
    return {"loss": loss.detach(), **contender.gradients()}


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
        # the same masks
        torch.manual_seed(0)
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


def test_a_layer_is_called_without_the_peft_model() -> None:
    base = build_layer(8, 12, torch.float32, CPU, 0)
    lora = make("lora", base, targets=["linear"])
    assert type(lora.call) is type(base)
