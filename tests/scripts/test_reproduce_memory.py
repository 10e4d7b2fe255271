"""`scripts/reproduce.py memory`: what is counted, predicted and shrunk, and a GPU that is too small."""

import contextlib
import gc
import json
import weakref

import pytest
import torch
from torch import nn

import reproduce
from dora_peft.ops import content
from reproduction import common as reproduce_common
from reproduction import memory as reproduce_memory
from reproduction import verdicts as reproduce_verdicts
from reproduction.common import Options
from reproduction.memory import DTYPE, families, measure, predict_saving, summarise
from reproduction.memory_figure import SHRUNK

CPU = torch.device("cpu")
FACTORS = {"llama": 512, "vl_bart": 64}


def call(results):
    reproduce.main(["memory", "--dry_run", "--results", str(results)])
    return json.loads((results / "memory_laptop_dry.json").read_text(encoding="utf-8"))


def build(family, device="cpu"):
    with torch.device(device):
        return family.build(torch.device(device))


def pretend(monkeypatch, too_large=lambda method, length: False):
    """Replace the measurement: every method takes 100 MiB, but 120 where the norm is not detached."""
    measured = []

    def fake(method, base, family, batch, length, device):
        measured.append((method, length))
        if too_large(method, length):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"total_mib": 120.0 if method.endswith("not_detached") else 100.0}

    monkeypatch.setattr(reproduce_memory, "measure", fake)
    # Asking git takes longer than all else.
    machine = {"device": "x86_64 CPU", "processor": "a processor", "commit": None}
    monkeypatch.setattr(reproduce_common, "describe_machine", lambda device: machine)
    return measured


def test_memory(tmp_path):
    content = call(tmp_path)
    for name, family in families(Options(dry_run=True)).items():
        found = content["summary"][name]
        values = found["total_mib"][found["setting"]]
        # what the dense algorithm keeps for the norm's gradient is one dense matrix per module, no more and no less
        assert found["saved_mib"]["measured"] == values["reference_not_detached"] - values["reference"]
        assert found["saved_mib"]["measured"] == pytest.approx(found["saved_mib"]["predicted"], rel=0.05)
        assert found["saved_mib"]["predicted"] == predict_saving(family)
        assert values["dora_not_detached"] - values["dora"] < 0.2 * found["saved_mib"]["measured"]
        assert found["paper_percent"] == pytest.approx({"llama": 24.4, "vl_bart": 12.4}[name], abs=0.05)
        savings, predicted = found["saving_percent_by_setting"], found["predicted_percent_by_setting"]
        assert list(savings) == list(predicted) == [f"{batch} x {length}" for batch, length in family.settings]
        # bf16 copies of q, k, v, up and down of the real model, at every size of ours
        if name == "llama":
            expected = 32 * (3 * 4096**2 + 2 * 4096 * 11008) * 2 / 1e9
            assert found["saved_gb"] == pytest.approx({"at_full_size": expected, "paper": 37.3 - 28.2})
        assert found["saving_percent"]["reference"] == savings[found["setting"]]
        assert found["ours_paper_dropout_to_lora"] == values["dora"] / values["lora"]
        # the dropout of our default is a separate case if there is dropout
        default = "dora_branch" if family.dropout else "dora"
        assert found["ours_to_lora"] == values[default] / values["lora"]
        assert ("dora_branch" in values) == (family.dropout > 0)
        assert reproduce_verdicts.judge_memory(name)({"memory": content})[1] in (
            reproduce_verdicts.YES, reproduce_verdicts.PARTLY, reproduce_verdicts.NO,
        )  # fmt: skip
    llama = content["summary"]["llama"]
    assert llama["ours_to_lora"] < llama["ours_paper_dropout_to_lora"]
    assert (tmp_path / "memory_laptop_dry.png").stat().st_size > 10000


def test_the_claim_comes_before_the_sweeps(tmp_path, monkeypatch):
    pretend(monkeypatch)
    keys = [key.split() for key in call(tmp_path)["runs"]]
    settings = list(dict.fromkeys((name, f"{batch} x {length}") for name, batch, _, length, _ in keys))
    assert settings == [("llama", "2 x 8"), ("vl_bart", "2 x 6"), ("llama", "2 x 16")]
    methods = [key[-1] for key in keys][:8]
    assert methods[:2] == ["reference_not_detached", "reference"]
    assert methods[-1] == "full"


@pytest.mark.parametrize("name", ["llama", "vl_bart"])
def test_what_a_step_holds(name):
    """The parts against what can be said of them beforehand, and the products in fp32 change no byte."""
    family = families(Options(dry_run=True))[name]
    base = build(family)
    held = sum(t.nbytes for t in [*base.parameters(), *base.buffers()])
    for method in ("lora", "reference_not_detached", "dora"):
        found = measure(method, base, family, 2, 6, CPU)
        trained = found["gradients_mib"] * 2**20
        weights = found["weights_mib"] * 2**20
        # ours also keeps the norms of W0 and of W0 + s B A, and what it divides by at least: fp32, per output row; and
        # what it compares with: A and B once more (all that is trained but m), and some elements of W0
        linears = [linear for _, linear in reproduce_memory.adapted_linears(base, family.targets)]
        rows = sum(linear.out_features for linear in linears)
        sampled = sum(content._elements(linear.weight).nbytes for linear in linears)
        kept = 3 * 4 * rows + trained - DTYPE.itemsize * rows + sampled
        assert weights == held + trained + (kept if method == "dora" else 0)
        assert found["optimizer_mib"] == 2 * found["gradients_mib"]
        parts = ("weights", "gradients", "optimizer", "saved")
        assert found["total_mib"] == sum(found[f"{part}_mib"] for part in parts)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reproduce_memory, "MatmulInFp32", contextlib.nullcontext)
            assert measure(method, base, family, 2, 6, CPU) == found
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())
    assert not gc.get_freeze_count()


def test_products_in_fp32_are_rounded_once():
    x, weight, bias = (torch.randn(*shape).to(DTYPE) for shape in ((3, 5), (4, 5), (4,)))
    expected = nn.functional.linear(x.float(), weight.float(), bias.float()).to(DTYPE)
    with reproduce_memory.MatmulInFp32():
        found = nn.functional.linear(x, weight, bias)
        # of another dtype: as ever
        exact = nn.functional.linear(x.double(), weight.double())
    assert found.dtype == DTYPE
    assert torch.equal(found, expected)
    assert exact.dtype == torch.float64


@pytest.mark.parametrize("name", FACTORS)
def test_the_laptop_size_is_the_full_size_shrunk(name):
    full, small = (families(Options(size=size))[name] for size in ("full", "laptop"))
    factor = FACTORS[name]
    assert SHRUNK[name] == factor
    assert predict_saving(full) == factor * predict_saving(small)
    models = [build(family, "meta") for family in (full, small)]
    weights = [sum(p.nbytes for p in model.parameters()) for model in models]
    assert weights[0] / weights[1] == pytest.approx({"llama": 512, "vl_bart": 59}[name], rel=0.01)
    ranks = [
        sum(
            family.rank * sum(linear.weight.shape)
            for _, linear in reproduce_memory.adapted_linears(model, family.targets)
        )
        for family, model in zip((full, small), models, strict=True)
    ]
    assert ranks[0] == factor * ranks[1]
    assert full.alpha / full.rank == small.alpha / small.rank
    assert full.dropout == small.dropout
    # layers x tokens x width of the activations
    layers = [model.config.num_hidden_layers for model in models]
    widths = [model.config.hidden_size for model in models]
    for (batch, length), (few, short) in zip(full.settings, small.settings, strict=True):
        ratio = layers[0] * widths[0] * batch * length / (layers[1] * widths[1] * few * short)
        # a batch of 38 stands for 300
        assert ratio == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize("claim", ["memory", "vl_bart", "pattern", "accuracy", "detach"])
def test_full_size_needs_a_gpu(claim, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        reproduce.main([claim, "--size", "full", "--results", str(tmp_path)])
    assert "needs a GPU of 80 GB, and found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setitem(reproduce_memory.SIZES["toy"], "ffn", 48),
        lambda patch: patch.setattr(reproduce_memory, "ANSWER_LEN", 4),
        lambda patch: patch.setitem(reproduce_memory.LLAMA, "toy", reproduce_memory.Shape(64, 96, 4, 2, 1, 128)),
        lambda patch: patch.setattr(reproduce_memory, "DTYPE", torch.float32),
    ],
)
def test_a_changed_constant_forgets_what_was_measured(change, tmp_path, monkeypatch):
    measured = pretend(monkeypatch)
    monkeypatch.setattr(reproduce_memory, "draw", lambda *args: None)
    call(tmp_path)
    count = len(measured)
    call(tmp_path)
    assert len(measured) == count
    change(monkeypatch)
    call(tmp_path)
    assert len(measured) == 2 * count


def test_the_settings_hold_what_a_figure_depends_on(tmp_path, monkeypatch):
    pretend(monkeypatch)
    settings = call(tmp_path)["settings"]
    assert settings["dtype"] == "bfloat16"
    assert settings["device"] in ("cpu", "cuda")
    llama = settings["models"]["llama"]
    assert set(llama) == {"shape", "targets", "rank", "alpha", "dropout"}
    assert llama["shape"]["hidden"] == 64
    assert llama["dropout"] == 0.05


def test_a_case_that_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    """As on 80 GB: full fine-tuning in the claim itself, and the dense algorithm in a part of the sweep."""
    large = [True]

    def too_large(method, length):
        return large[0] and (method == "full" or (length == 16 and method.startswith("reference")))

    pretend(monkeypatch, too_large)
    content = call(tmp_path)
    run = content["runs"]["llama 2 x 16 reference"]
    assert run["out_of_memory"] is True
    assert "total_mib" not in run
    found = content["summary"]["llama"]
    assert list(found["total_mib"]["2 x 16"]) == ["dora_not_detached", "dora", "dora_branch", "peft_dora", "lora"]
    assert "full" not in found["total_mib"]["2 x 8"]
    assert list(found["saving_percent_by_setting"]) == list(found["predicted_percent_by_setting"]) == ["2 x 8"]
    assert found["saving_percent"]["reference"] == pytest.approx(100 / 6)
    assert reproduce_verdicts.judge_memory("llama")({"memory": content})[1] == reproduce_verdicts.PARTLY
    assert "llama 2 x 16 reference: out_of_memory 1" in capsys.readouterr().out
    # the next call tries again what did not fit, and nothing else
    large[0] = False
    again = call(tmp_path)
    assert "out_of_memory" not in str(again["runs"])
    assert again["runs"]["llama 2 x 8 lora"] == content["runs"]["llama 2 x 8 lora"]
    assert list(again["summary"]["llama"]["saving_percent_by_setting"]) == ["2 x 8", "2 x 16"]


@pytest.mark.parametrize("fits", [("dora", "lora"), ()])
def test_the_claim_itself_does_not_fit(fits, tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, lambda method, length: length == 8 and method not in fits)
    content = call(tmp_path)
    assert "LLaMA-7B, batch x length 2 x 8: the dense algorithm did not fit into memory" in capsys.readouterr().out
    found = content["summary"]["llama"]
    assert found["setting"] == "2 x 8"
    assert set(found["total_mib"]["2 x 8"]) == set(fits)
    assert found["saving_percent"] == {}
    assert list(found["saving_percent_by_setting"]) == ["2 x 16"]
    assert set(found["saved_mib"]) == {"predicted"}
    assert reproduce_verdicts.judge_memory("llama")({"memory": content})[1] == reproduce_verdicts.OPEN
    assert reproduce_verdicts.judge_memory("vl_bart")({"memory": content})[1] != reproduce_verdicts.OPEN
    assert (tmp_path / "memory_laptop_dry.png").stat().st_size > 10000


def test_what_did_not_fit_is_freed(monkeypatch):
    alive = []

    def fail(method, base, *case):
        model = nn.Linear(2, 2)
        alive.append(weakref.ref(model))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(reproduce_memory, "measure", fail)
    assert reproduce_memory.measure_if_it_fits("full", lambda: None) == {"out_of_memory": True}
    assert alive[0]() is None


def test_an_error_of_another_kind_is_raised(monkeypatch):
    def fail(*case):
        raise RuntimeError("something else")

    monkeypatch.setattr(reproduce_memory, "measure", fail)
    with pytest.raises(RuntimeError, match="something else"):
        reproduce_memory.measure_if_it_fits("full", lambda: None)


def test_a_base_is_built_where_something_is_left_to_measure(tmp_path, monkeypatch):
    built = []
    original = reproduce_memory.build_base
    monkeypatch.setattr(reproduce_memory, "build_base", lambda *args: built.append(args[4].type) or original(*args))
    pretend(monkeypatch)
    for _ in range(2):
        call(tmp_path)
    # once for the claim and once for the sweep, then never; the prediction needs shapes only
    assert [kind for kind in built if kind != "meta"] == [Options().device.type] * 2


def test_prediction_is_of_the_measured_total():
    family = families(Options(dry_run=True))["vl_bart"]
    runs = {
        f"vl_bart 2 x 6 {method}": {"total_mib": 50.0 if method == "reference_not_detached" else 45.0}
        for method in family.methods()
    }
    found = summarise(runs, "vl_bart", family, 4.0)
    assert found["saved_mib"] == {"predicted": 4.0, "measured": 5.0}
    assert found["predicted_percent_by_setting"] == {"2 x 6": pytest.approx(8.0)}
    assert found["saving_percent"]["reference"] == pytest.approx(10.0)
