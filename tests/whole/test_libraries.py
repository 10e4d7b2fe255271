"""Libraries that rewrite an adapter's parameters where autograd does not see it: outputs and gradients stay right."""

import pytest
import torch
import torch.nn.functional as F
from layer_fixtures import distance, seeded
from peft import LoraConfig, get_peft_model
from torch import nn

from dora_peft import DoraConfig, accelerate_use_dora, implementation, reference

# As users run: the checking mode would find a stale norm by itself.
pytestmark = [
    pytest.mark.cached_norms,
    # the libraries' own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LAYERS = ["gate", "up", "down"]
X = torch.randn(5, 8, generator=seeded(3))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16, bias=False), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def trained(config=DoraConfig, **options):
    """A model whose adapter has nothing left of its initial values."""
    torch.manual_seed(0)
    model = get_peft_model(MLP(), config(r=2, lora_alpha=4, target_modules=LAYERS, **options))
    generator = seeded(1)
    with torch.no_grad():
        for name, p in adapter(model).items():
            if "magnitude" in name:
                p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=generator))
            else:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(params=["DoraConfig", "use_dora", "compiled"])
def subject(request):
    """A model with a trained adapter, and what calls it; by `accelerate_use_dora()` where the adapter is PEFT's own."""
    if request.param == "use_dora":
        with accelerate_use_dora():
            model = trained(LoraConfig, use_dora=True)
            yield model, model
    elif request.param == "compiled":
        model = trained()
        # eager, so that all starts from the right norm and only the library can bring in a wrong one
        model(X)
        torch._dynamo.reset()
        with torch._dynamo.config.patch(recompile_limit=32):
            # one per mode, adapter and what requires gradients
            yield model, torch.compile(model, backend="eager", fullgraph=True)
    else:
        model = trained()
        yield model, model


def adapter(model, name="default"):
    return {n: p for n, p in model.named_parameters() if "lora_" in n and f".{name}." in n}


def loss_of(y):
    return y.square().mean()


def exact(model, parameters, name="default"):
    """The output for X, and the gradients of its loss, with these parameters, by the dense reference in float64."""
    leaves = {n: p.detach().double().requires_grad_() for n, p in parameters.items()}

    def linear(x, layer):
        module, parts = model.base_model.model.get_submodule(layer), ("lora_A", "lora_B", "lora_magnitude_vector")
        A, B, m = (leaves[f"base_model.model.{layer}.{part}.{name}.weight"] for part in parts)
        base = module.get_base_layer()
        bias = None if base.bias is None else base.bias.detach().double()
        return reference.dora_linear(x, base.weight.detach().double(), A, B, m, module.scaling[name], bias)

    x = X.double()
    y = linear(F.silu(linear(x, "gate")) * linear(x, "up"), "down")
    gradients = torch.autograd.grad(loss_of(y), list(leaves.values()))
    return y.detach(), dict(zip(leaves, gradients, strict=True))


def assert_right(model, forward, name="default"):
    """In evaluation, in training, and without gradients, with the parameters as they are now; returns the output."""
    parameters = adapter(model, name)
    y, gradients = exact(model, parameters, name)
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            assert distance(forward(X), y) < 1e-5, f"{training=}"
        output = forward(X)
        assert distance(output, y) < 1e-5, f"{training=}, with gradients"
        if output.requires_grad:
            found = torch.autograd.grad(loss_of(output), list(parameters.values()))
            for n, gradient in zip(parameters, found, strict=True):
                assert distance(gradient, gradients[n]) < 1e-4, f"{n}, {training=}"
    return y


def train(model, forward, optimizer, steps=2):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(forward(X)).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("subject", "foreach"), [("DoraConfig", False), ("use_dora", True), ("compiled", True)], indirect=["subject"]
)
def test_ema_weights_are_swapped_in_and_out(subject, foreach):
    """`copy_to` and `restore` write through `.data`: no version counter moves."""
    training_utils = pytest.importorskip("diffusers.training_utils", reason="the extra `libraries` has no diffusers")
    model, forward = subject
    parameters = list(adapter(model).values())
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    average = training_utils.EMAModel(parameters, decay=0.9, min_decay=0.9, foreach=foreach)
    for _ in range(2):
        for _ in range(2):
            # the average's first step copies
            train(model, forward, optimizer, steps=1)
            average.step(parameters)
        live = assert_right(model, forward)
        average.store(parameters)
        average.copy_to(parameters)
        averaged = assert_right(model, forward)
        assert distance(averaged, live) > 0.01
        average.restore(parameters)
        assert torch.equal(assert_right(model, forward), live)


@pytest.mark.parametrize(
    ("subject", "kind"),
    [
        ("DoraConfig", "AdamWScheduleFree"),
        ("use_dora", "ScheduleFreeWrapper"),
        ("compiled", "ScheduleFreeWrapper"),
    ],
    indirect=["subject"],
)
def test_schedule_free_optimizers_swap_weights(subject, kind):
    """`eval()` and `train()` move the weights outside any step, and the wrapper once more after the inner step."""
    schedulefree = pytest.importorskip("schedulefree", reason="the extra `libraries` is not installed")
    model, forward = subject
    parameters = list(adapter(model).values())
    if kind == "AdamWScheduleFree":
        optimizer = schedulefree.AdamWScheduleFree(parameters, lr=0.05, weight_decay=0.0)
    else:
        optimizer = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(parameters, lr=2.0), momentum=0.9)
    for _ in range(2):
        optimizer.train()
        assert_right(model, forward)
        train(model, forward, optimizer, steps=3)
        gradient_point = assert_right(model, forward)
        optimizer.eval()
        averaged = assert_right(model, forward)
        assert distance(averaged, gradient_point) > 0.001


def test_lomo_updates_inside_backward(subject):
    """Plain gradient descent, in hooks and through `.data`; there is no `step()`."""
    lomo_optim = pytest.importorskip("lomo_optim", reason="the extra `libraries` is not installed")
    model, forward = subject
    expected = {n: p.detach().double() for n, p in adapter(model).items()}
    optimizer = lomo_optim.Lomo(model, lr=1.0)
    model.train()
    for _ in range(4):
        _, gradients = exact(model, expected)
        expected = {n: p - 1.0 * gradients[n] for n, p in expected.items()}
        optimizer.fused_backward(loss_of(forward(X)), lr=1.0)
        for n, p in adapter(model).items():
            assert distance(p, expected[n]) < 1e-6, n
    assert_right(model, forward)


def test_adalomo_updates_inside_backward(subject, monkeypatch):
    lomo_optim = pytest.importorskip("lomo_optim", reason="the extra `libraries` is not installed")
    if not torch.cuda.is_available():
        # it asks for its state to lie there
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)

    def updated(model, forward):
        optimizer = lomo_optim.AdaLomo(model, lr=0.1)
        model.train()
        for _ in range(4):
            optimizer.fused_backward(loss_of(forward(X)), lr=0.1)
        return adapter(model)

    with implementation("reference"):
        exact_model = trained()
        expected = updated(exact_model, exact_model)
    model, forward = subject
    for n, p in updated(model, forward).items():
        assert distance(p, expected[n].double()) < 1e-5, n
    assert_right(model, forward)


def test_a_frozen_copy_follows_the_trained_adapter(subject):
    """A reference adapter, written through `.data` as TRL makes it, and then a moving average of the trained one."""
    model, forward = subject
    parameters = list(adapter(model).values())
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    model.add_adapter("ref", model.peft_config["default"])

    def follow(weight):
        for n, p in adapter(model).items():
            model.get_parameter(n.replace(".default.", ".ref.")).data.lerp_(p.data, weight)

    for weight in (1.0, 0.5, 0.5):
        follow(weight)
        model.set_adapter("ref", inference_mode=True)
        assert_right(model, forward, "ref")
        model.set_adapter("default")
        train(model, forward, optimizer)
        assert_right(model, forward)
