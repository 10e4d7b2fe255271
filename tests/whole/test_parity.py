"""The tuner against PEFT's `LoraConfig(use_dora=True)`: outputs, gradients, training, merging, initial tensors."""

import copy

import peft
import pytest
import torch
from packaging.version import Version
from parity_fixtures import MODELS, loss_of, outputs, same_tensors, trainable
from peft import LoraConfig, get_peft_model

from dora_peft import DoraConfig


def base_model(kind):
    """A model in float64 whose weights, biases included, are all random."""
    torch.manual_seed(0)
    model = MODELS[kind][0]().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pair(kind, base=None, **options):
    """PEFT's model and ours on copies of one base, created from the same seed."""
    base = base_model(kind) if base is None else base
    models = []
    for config in (lambda **kwargs: LoraConfig(use_dora=True, **kwargs), DoraConfig):
        torch.manual_seed(1)
        settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **MODELS[kind][2], **options}
        models.append(get_peft_model(copy.deepcopy(base), config(**settings)))
    return models


def away_from_the_start(models):
    """The same change of every adapter tensor, magnitudes included."""
    for model in models:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _, parameter in sorted(trainable(model).items()):
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("kind", MODELS)
def test_forward(kind):
    theirs, ours = pair(kind)
    same_tensors(trainable(ours), trainable(theirs))
    away_from_the_start((theirs, ours))
    expected = outputs(theirs, kind)
    torch.testing.assert_close(outputs(ours, kind), expected)
    assert not torch.allclose(outputs(ours.unload(), kind), expected, rtol=1e-2)


@pytest.mark.parametrize("kind", MODELS)
def test_gradients(kind):
    theirs, ours = pair(kind)
    away_from_the_start((theirs, ours))
    gradients = []
    for model in (theirs, ours):
        loss_of(model, kind).backward()
        gradients.append({name: parameter.grad for name, parameter in trainable(model).items()})
    assert all(grad.abs().max() > 0 for name, grad in gradients[0].items() if ".k_proj." not in name)
    same_tensors(gradients[1], gradients[0])


@pytest.mark.parametrize("kind", MODELS)
def test_ten_optimizer_steps_and_merging(kind):
    models = pair(kind)
    theirs, ours = models
    start = {name: parameter.detach().clone() for name, parameter in trainable(ours).items()}
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0)
        history = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, kind)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in trainable(ours).items())
    # Adam divides by the root of squared gradients, so that rounding counts where these are nearly 0
    same_tensors(trainable(ours), trainable(theirs), rtol=1e-6, atol=1e-7)
    for model in models:
        model.eval()
    expected = outputs(ours, kind)
    torch.testing.assert_close(expected, outputs(theirs, kind), rtol=1e-6, atol=1e-6)
    merged = [model.merge_and_unload() for model in models]
    same_tensors(merged[1].state_dict(), merged[0].state_dict(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(outputs(merged[1], kind), expected)


@pytest.mark.parametrize("kind", ["llama", "conv2d", "embedding"])
def test_several_active_adapters_in_evaluation(kind):
    models = pair(kind)
    for model, config in zip(models, (lambda **k: LoraConfig(use_dora=True, **k), DoraConfig), strict=True):
        torch.manual_seed(3)
        model.add_adapter("second", config(r=2, lora_alpha=3, init_lora_weights=False, **MODELS[kind][2]))
        model.base_model.set_adapter(["default", "second"])
    away_from_the_start(models)
    for model in models:
        model.eval()
    torch.testing.assert_close(outputs(models[1], kind), outputs(models[0], kind))
    if Version(peft.__version__) < Version("0.21"):
        pytest.skip("PEFT 0.20 merges several DoRA adapters to another weight than it runs with")
    for model in models:
        model.merge_adapter()
    same_tensors(
        {n: p for n, p in models[1].state_dict().items() if "base_layer" in n},
        {n: p for n, p in models[0].state_dict().items() if "base_layer" in n},
    )


def test_paper_dropout_is_pefts():
    options = {"lora_dropout": 0.5, "target_modules": ["head"], "init_lora_weights": False}
    results = []
    for config in (LoraConfig(use_dora=True, **options), DoraConfig(dropout_mode="paper", **options)):
        base = base_model("conv2d")
        torch.manual_seed(4)
        model = get_peft_model(base, config)
        away_from_the_start([model])
        torch.manual_seed(5)
        results.append(outputs(model, "conv2d"))
    torch.testing.assert_close(results[1], results[0])


INITIALISATIONS = [
    *((init, False) for init in (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")),
    (True, True),
    ("pissa", True),
    # PEFT's LoftQ computes on CUDA only
    pytest.param("loftq", False, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("init", "use_rslora"), INITIALISATIONS)
def test_initial_tensors(init, use_rslora):
    if init == "loftq":
        pytest.importorskip("scipy")
    options = {"init_lora_weights": init, "use_rslora": use_rslora}
    if init == "loftq":
        options["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1}
    base = base_model("llama").float()
    theirs, ours = pair("llama", base, **options)
    # the base weights as well: some initialisations move a part of them into the adapter
    same_tensors(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs(ours, "llama"), outputs(theirs, "llama"), rtol=1e-4, atol=1e-5)
    if init not in (False, "loftq"):
        torch.testing.assert_close(outputs(ours, "llama"), outputs(base, "llama"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", ["gpt2", "conv2d", "conv1d", "embedding"])
def test_initial_tensors_of_other_layers(kind, init):
    theirs, ours = pair(kind, init_lora_weights=init)
    same_tensors(ours.state_dict(), theirs.state_dict())


def test_ranks_and_alphas_per_module():
    options = {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"q_proj": 9}}
    theirs, ours = pair("llama", **options)
    same_tensors(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(outputs(ours, "llama"), outputs(theirs, "llama"))
