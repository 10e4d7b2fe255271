"""PEFT's own use_dora layers, taken over: equal results, PEFT's parameters, undoable."""

import contextlib
import copy
import gc
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from trainer_fixtures import arguments, llama, losses, tokenizer
from transformers.pytorch_utils import Conv1D

import dora_peft
from dora_peft import norms
from dora_peft.layers.shortcut import Shortcut
from dora_peft.plugin import use_dora

LAYERS = {
    "linear": lambda: nn.Linear(12, 10),
    "linear-no-bias": lambda: nn.Linear(12, 10, bias=False),
    "Conv1D": lambda: Conv1D(10, 12),
    "embedding": lambda: nn.Embedding(12, 10),
    "conv1d": lambda: nn.Conv1d(12, 6, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(12, 6, 3, stride=2, padding=1),
}


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def peft_model(kind="linear", dtype=torch.float64, **options):
    torch.manual_seed(0)
    base = One(LAYERS[kind]().to(dtype) if isinstance(kind, str) else kind)
    for bits in (4, 8):
        # what from_pretrained sets, and PEFT chooses its classes by
        setattr(base, f"is_loaded_in_{bits}bit", type(kind).__name__.startswith(f"Linear{bits}bit"))
    options.setdefault("fan_in_fan_out", kind == "Conv1D")
    model = get_peft_model(base, LoraConfig(r=3, use_dora=True, target_modules=["layer"], **options))
    for name, p in model.named_parameters():
        # as after some training
        if "lora_" in name:
            p.data = torch.randn_like(p) * 0.3 + (1 if "magnitude" in name else 0)
    return model


def example(kind, dtype=torch.float64):
    torch.manual_seed(1)
    if kind == "embedding":
        return torch.randint(0, 12, (2, 5))
    shape = {"conv1d": (2, 12, 7), "conv2d": (2, 12, 7, 6)}.get(kind, (2, 5, 12))
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def run(model, x, seed=3):
    torch.manual_seed(seed)
    y = model(x)
    leaves = [p for p in model.parameters() if p.requires_grad] + [x] * x.requires_grad
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)]


@pytest.fixture
def taken(monkeypatch):
    """A list that grows with every layer call that this package computes."""
    calls = []
    for owner, name in ((use_dora, "_adapted"), (Shortcut, "__call__")):
        original = getattr(owner, name)

        def counted(*args, _original=original):
            found = _original(*args)
            if found is not None:
                calls.append(1)
            return found

        monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_peft(kind, training, p, taken):
    model, x = peft_model(kind, lora_dropout=p).train(training), example(kind)
    expected = run(model, x)
    with dora_peft.accelerate_use_dora():
        found = run(model, x)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), model(x))
    assert taken
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_parameters_that_a_caller_lends():
    """Plain tensors stand for A, B and m then, as FSDP and DataParallel have them too."""
    model, x = peft_model("linear"), example("linear")
    lent = {name: 1.5 * parameter.detach() for name, parameter in model.named_parameters()}
    expected = torch.func.functional_call(model, lent, (x,))
    with dora_peft.accelerate_use_dora():
        for _ in range(2):
            torch.testing.assert_close(torch.func.functional_call(model, lent, (x,)), expected)


def test_a_nested_switch_forgets_no_tied_row():
    """After a step the magnitude of a zero row is no longer its norm, so that nothing but memory shows the tie."""
    model, x = peft_model("linear"), example("linear")
    layer = model.base_model.model.layer
    with torch.no_grad(), dora_peft.accelerate_use_dora():
        layer.base_layer.weight[2] = 0
        layer.lora_B["default"].weight[2] = 0
        layer.lora_magnitude_vector["default"].weight[2] = 0
        model(x)
        layer.lora_B["default"].weight[2] = 0.5
        expected = model(x)
        with dora_peft.accelerate_use_dora("branch"):
            torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x), expected)


def test_trains_as_peft_does(taken):
    one, other = peft_model(), peft_model()
    x = example("linear")
    for model, on in ((one, False), (other, True)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0)
        acceleration = dora_peft.accelerate_use_dora() if on else None
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        if acceleration:
            acceleration.undo()
    assert len(taken) == 5
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


@pytest.mark.cached_norms
def test_refreshes_once_a_step(monkeypatch):
    model, x, calls = peft_model(), example("linear"), []
    original = norms.Norm.renew
    monkeypatch.setattr(norms.Norm, "renew", lambda *a: (calls.append(1), original(*a))[1])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with dora_peft.accelerate_use_dora():
        for _ in range(3):
            calls.clear()
            for _ in range(4):
                model(x).sum().backward()
            assert len(calls) == 1
            optimizer.step()


def test_branch_dropout_leaves_the_base_product_whole():
    model = peft_model(lora_dropout=0.5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            # what is dropped then makes no difference
            p.data.zero_()
    x = example("linear")
    with dora_peft.accelerate_use_dora(dropout_mode="branch"):
        torch.testing.assert_close(model(x), model.eval()(x))
    with dora_peft.accelerate_use_dora():
        assert not torch.allclose(model.train()(x), model.eval()(x))


def test_undo_and_nesting():
    before = lora.Linear.forward
    outer = dora_peft.accelerate_use_dora()
    assert lora.Linear.forward is not before
    with dora_peft.accelerate_use_dora("branch"):
        peft_model()(example("linear"))
    assert lora.Linear.forward is not before
    outer.undo()
    outer.undo()
    assert lora.Linear.forward is before
    assert not len(norms.views)


def test_unknown_dropout_mode():
    before = lora.Linear.forward
    with pytest.raises(ValueError, match="'peft' or 'branch', found 'paper'"):
        dora_peft.accelerate_use_dora("paper")
    assert lora.Linear.forward is before


def test_what_stays_with_peft_is_listed_once(taken):
    model, x = peft_model(), example("linear")
    model.add_adapter("other", LoraConfig(r=2, use_dora=True, target_modules=["layer"]))
    model.base_model.set_adapter(["default", "other"])
    expected = model(x)
    with dora_peft.accelerate_use_dora():
        with pytest.warns(UserWarning, match="leaves these DoRA layers to PEFT.*Linear.*several active adapters"):
            found = model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
    assert not taken
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*groups > 1.*")
def test_grouped_convolutions_stay_with_peft(taken):
    model = peft_model(nn.Conv1d(12, 6, 3, groups=3).double())
    x = torch.randn(2, 12, 7, dtype=torch.float64)
    expected = model(x)
    with dora_peft.accelerate_use_dora(), pytest.warns(UserWarning, match="grouped convolution"):
        torch.testing.assert_close(model(x), expected)
    assert not taken


def test_plain_lora_disabled_and_merged_adapters_are_left_alone(taken):
    torch.manual_seed(0)
    plain = get_peft_model(One(nn.Linear(12, 10)), LoraConfig(r=3, target_modules=["layer"]))
    model, x = peft_model(), example("linear")
    with dora_peft.accelerate_use_dora():
        plain(x.float())
        with model.disable_adapter():
            torch.testing.assert_close(model(x), model.base_model.model.layer.base_layer(x))
        unmerged = model(x)
        taken.clear()
        model.merge_adapter()
        torch.testing.assert_close(model(x), unmerged)
        assert not taken
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), unmerged)
        assert taken


def test_checkpoints_stay_pefts(tmp_path):
    model, x = peft_model(dtype=torch.float32), example("linear", torch.float32)
    keys = list(model.state_dict())
    with dora_peft.accelerate_use_dora():
        y = model(x)
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), y)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(One(LAYERS["linear"]()), tmp_path)
    torch.testing.assert_close(loaded(x), y)


def test_does_not_keep_a_model_alive():
    with dora_peft.accelerate_use_dora():
        model = peft_model()
        model(example("linear"))
        layer = weakref.ref(model.base_model.model.layer)
        del model
        gc.collect()
        assert layer() is None


def bitsandbytes_model(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return peft_model(layer.to("cpu"))


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_layers_equal_peft(bits, taken):
    x = torch.randn(2, 5, 64, requires_grad=True)
    # once: the second pass of an 8-bit layer fails in PEFT 0.21 on a CPU
    expected = run(bitsandbytes_model(bits), x)
    model = bitsandbytes_model(bits)
    assert type(model.base_model.model.layer) is (lora.Linear4bit if bits == 4 else lora.Linear8bitLt)
    with dora_peft.accelerate_use_dora():
        for _ in range(2):
            for a, b in zip(run(model, x), expected, strict=True):
                # PEFT rounds its norm through the quantised weight's own dtype, fp16 for 8 bits
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert len(taken) == 2


# TRL's remarks on the tokenizer and on its own defaults
@pytest.mark.filterwarnings("ignore")
def test_trls_trainer_trains_as_without(tmp_path, taken):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    data = datasets.Dataset.from_dict({"text": ["the cat sat on a mat", "a dog ran and sat", "the dog ran on"] * 4})
    found = {}
    for on in (False, True):
        options = arguments(tmp_path / str(on), max_steps=3)
        args = trl.SFTConfig(**options, max_length=16, bf16=False, gradient_checkpointing=True)
        config = LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        trainer = trl.SFTTrainer(llama(), args, train_dataset=data, processing_class=tokenizer(), peft_config=config)
        with dora_peft.accelerate_use_dora() if on else contextlib.nullcontext():
            trainer.train()
        found[on] = losses(trainer)
        assert bool(taken) == on
    assert len(found[True]) == 3
    assert found[True] == pytest.approx(found[False], rel=1e-4)


@pytest.mark.parametrize("how", ["at once", "a copy after a step"])
def test_zero_rows_of_pefts_layers_are_tied(how):
    """PEFT gives NaN there; m stays 0 in its layers while B grows."""
    torch.manual_seed(0)
    base = One(nn.Linear(12, 10))
    with torch.no_grad():
        base.layer.weight[:3] = 0
    model = get_peft_model(base, LoraConfig(r=3, use_dora=True, target_modules=["layer"]))
    x = torch.randn(5, 12)
    with dora_peft.accelerate_use_dora():
        model(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        layer = model.base_model.model.layer
        if how == "a copy after a step":
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
            layer = copy.deepcopy(model).base_model.model.layer
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        plain = x @ (B @ A).T * layer.scaling["default"] + layer.base_layer.bias
        torch.testing.assert_close(layer(x)[:, :3], plain[:, :3])
