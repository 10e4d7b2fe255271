"""What the backward pass computes again is what the forward pass computed."""

import pytest
import torch
from kept_output_fixtures import CONSUMERS, SURROUNDINGS, assert_equal, gradients
from layer_fixtures import Truth, adapted, base_of, distance, dora, example, found_gradients, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dora_peft
from dora_peft import DoraConfig

pytestmark = pytest.mark.filterwarnings("ignore:Other code overwrites")


@pytest.mark.cached_norms
@pytest.mark.parametrize("magnitude_only", [False, True])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv1d", "conv2d", "conv2d-grouped"])
def test_recomputation_under_autocast(kind, magnitude_only):
    options = {"magnitude_only_modules": ["layer"]} if magnitude_only else {}
    model = adapted(kind, **options)
    for dtype in (torch.float32, torch.bfloat16):
        # the latter as another layer gives it
        x = example(model).detach().to(dtype).requires_grad_()
        probe = None
        results = []
        for consumer in (torch.relu, torch.relu_):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = model(x)
                out = consumer(y)
            probe = torch.randn(out.shape, generator=seeded(3)).to(out.dtype) if probe is None else probe
            out.backward(probe)
            results.append(dora(model).lora_magnitude_vector["default"].weight.grad.clone())
        assert distance(results[1], results[0].double()) <= 2**-6


@pytest.mark.cached_norms
@pytest.mark.parametrize("magnitude_only", [False, True])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d", "embedding", "embedding-padding"])
def test_a_base_weight_exchanged_before_backward(kind, magnitude_only):
    """Its graph keeps the weight that it was made with, also where it computes the output again."""
    options = {"magnitude_only_modules": ["layer"]} if magnitude_only else {}
    model = adapted(kind, **options)
    x, probe = example(model), None
    results = []
    for exchange in (False, True):
        y = model(x)
        probe = torch.randn(y.shape, generator=seeded(4)) if probe is None else probe
        out = y.mul_(2.0)
        if exchange:
            base = base_of(model)
            base.weight = nn.Parameter(torch.randn_like(base.weight), requires_grad=False)
            dora(model).scaling["default"] *= -1
        results.append(found_gradients(model, x, out, probe))
    for name, grad in results[1].items():
        assert distance(grad, results[0][name].double()) <= 1e-5, name


@pytest.mark.cached_norms
@pytest.mark.parametrize("kind", ["embedding-scaled"])
def test_a_table_exchanged_before_backward_is_named(kind):
    model = adapted(kind)
    y = model(example(model)).mul_(2.0)
    base_of(model).weight = nn.Parameter(torch.randn(12, 10), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"base weight of module 'layer' was changed between"):
        y.sum().backward()


@pytest.mark.cached_norms
@pytest.mark.parametrize("consumer", [torch.relu, torch.relu_])
@pytest.mark.parametrize("magnitude_only", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_hooks_on_the_base_run_once_and_are_not_run_again(kind, magnitude_only, consumer):
    """They may draw random numbers, count, or be gone before backward; a zero magnitude asks for their output too."""
    options = {"magnitude_only_modules": ["layer"]} if magnitude_only else {}
    model, calls = adapted(kind, **options), []
    with torch.no_grad():
        dora(model).magnitude("default").view(-1)[:2] = 0

    def hook(module, args, out):
        calls.append(1)
        return torch.nn.functional.dropout(2 * out, 0.5)

    def run(implementation):
        calls.clear()
        model.zero_grad()
        handle = base_of(model).register_forward_hook(hook)
        torch.manual_seed(3)
        with dora_peft.implementation(implementation):
            out = consumer(model(example(model)))
        handle.remove()
        out.square().sum().backward()
        assert len(calls) == 1
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    assert_equal(run("auto"), run("reference"))


@pytest.mark.cached_norms
@pytest.mark.parametrize("magnitude_only", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("case", ["bias 1e5", "c 1e-5"])
def test_single_precision_is_not_drowned_either(case, kind, magnitude_only):
    options = {"magnitude_only_modules": ["layer"]} if magnitude_only else {}
    model = adapted(kind, **options)
    with torch.no_grad():
        if case == "bias 1e5":
            base_of(model).bias.mul_(1e5)
        else:
            dora(model).magnitude("default").mul_(1e-5)
    x = example(model, batch=16)
    y = model(x)
    probe = torch.randn(y.shape, generator=seeded(5))
    found = found_gradients(model, x, y, probe)["default.m"]
    assert distance(found, Truth(model, x).gradients(probe)["default.m"]) <= 2e-3


@pytest.mark.cached_norms
@pytest.mark.parametrize("road", ["fast", "magnitude only", "two adapters", "compiled", "reference"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv1d", "conv2d"])
def test_the_bias_does_not_drown_the_gradient_of_m(kind, road):
    """|b| = 100 in bf16: a rounded output with b holds 2 of the 8 digits of the rest."""
    options = {"magnitude_only_modules": ["layer"]} if road == "magnitude only" else {}
    model = adapted(kind, torch.bfloat16, **options)
    with torch.no_grad():
        base_of(model).bias.normal_().mul_(100)
    adapters = ("default",)
    if road == "two adapters":
        model.add_adapter("other", DoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
        adapters = ("default", "other")
    call = torch.compile(model, backend="aot_eager") if road == "compiled" else model
    x = example(model, batch=16)
    with dora_peft.implementation("reference" if road == "reference" else "auto"):
        y = call(x)
        probe = torch.randn(y.shape, generator=seeded(5)).to(y.dtype)
        found = found_gradients(model, x, y, probe, adapters)
    expected = Truth(model, x, adapters=adapters).gradients(probe)
    for adapter in adapters:
        assert distance(found[f"{adapter}.m"], expected[f"{adapter}.m"]) <= 0.02


class RefusesToWait(TorchDispatchMode):
    """Fails where a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_to_copy")
        assert not any(name == f"aten::{word}" for word in waits[:4]), name
        if name == "aten::_to_copy":
            assert (kwargs or {}).get("device") is None, name
        return func(*args, **(kwargs or {}))


@pytest.mark.cached_norms
@pytest.mark.implementation("triton")
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_kernels_decide_without_waiting_for_the_host(consumer):
    """In the very backward pass, on the device; the host learns of it at a later forward pass."""
    unseen, plain = CONSUMERS[consumer]
    model = adapted("linear")
    x = example(model)
    expected = gradients(model, x, plain, SURROUNDINGS["plain"])
    with RefusesToWait():
        y = model(x)
        out = unseen(y)
        (out * torch.randn(out.shape, generator=seeded(2))).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    # they accumulate
    assert_equal({name: grad - expected[name] for name, grad in found.items()}, expected)
    assert not dora(model)._outputs.overwritten
    model(x)
    assert dora(model)._outputs.overwritten
