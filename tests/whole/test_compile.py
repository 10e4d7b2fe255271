"""torch.compile: one graph, the results of eager, and a norm that follows the optimizer without a new compilation."""

import pytest
import torch
from covering import pairs
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dora_peft
from dora_peft import DoraConfig, layers

KINDS = ["branch", "full gradient", "dropout", "bf16", "several"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, ids):
        return self.down(torch.tanh(self.up(self.embed(ids))))


def made(kind):
    torch.manual_seed(0)
    config = DoraConfig(
        r=3,
        target_modules=["embed", "up", "down"],
        init_lora_weights=False,
        detach_norm=kind != "full gradient",
        lora_dropout=0.3 if kind == "dropout" else 0.0,
    )
    model = get_peft_model(Net().to(torch.bfloat16 if kind == "bf16" else torch.float32), config)
    if kind == "several":
        model.add_adapter("other", DoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    return model


def compiled(model, **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, fullgraph=True, **options)


# of the compiler's own
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_training_in_one_graph(kind):
    eager, model = made(kind), made(kind)
    fast = compiled(model, backend="aot_eager", dynamic=True)
    # roundings must not add up over the steps
    lr = 1e-5 if kind == "bf16" else 1e-3
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=lr) for m in (eager, model)]
    for step in range(3):
        ids = torch.randint(0, 20, (2, 5 + step))
        losses = []
        for m, optimizer in zip((eager, fast), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = m(ids).float().square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        # whose masks eager draws in its own way
        if kind != "dropout":
            tolerance = {"rtol": 3e-2, "atol": 3e-2} if kind == "bf16" else {"rtol": 1e-5, "atol": 0}
            torch.testing.assert_close(*losses, **tolerance)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        found, expected = fast.eval()(ids), eager.eval()(ids)
    torch.testing.assert_close(found, expected, **({"rtol": 3e-2, "atol": 3e-2} if kind == "bf16" else {}))


def operators_called(model, ids, **options):
    """The package's operators in the graph that a call makes."""
    called = []

    def backend(graph, _):
        called.extend(str(n.target) for n in graph.graph.nodes if str(n.target).startswith("dora_peft"))
        return graph.forward

    compiled(model, backend=backend, **options)(ids)
    return called


@pytest.mark.filterwarnings("ignore")
@pytest.mark.implementation("torch")
@pytest.mark.parametrize("kind", [*KINDS, "evaluation", "tied"])
def test_what_the_graph_computes_itself(kind):
    """v of dense fp32 weights in training; it is looked up in all other cases, such as decoding."""
    model, ids = made("branch" if kind in ("evaluation", "tied") else kind), torch.randint(0, 20, (2, 5))
    if kind == "tied":
        torch.manual_seed(0)
        base = Net()
        base.up.weight.data[3] = 0
        model = get_peft_model(base, DoraConfig(r=3, target_modules=["up"]))
    with torch.set_grad_enabled(kind != "evaluation"):
        called = operators_called(model, ids)
    looked_up = kind in ("bf16", "full gradient", "evaluation", "tied")
    assert bool(called) == looked_up, called


@pytest.mark.filterwarnings("ignore")
@pytest.mark.implementation("torch")
@pytest.mark.parametrize(("kind", "products"), [("branch", 1), ("dropout", 0)])
def test_one_product_serves_the_norm_and_the_output(kind, products, monkeypatch):
    """Under dropout the low-rank branch sees another x."""
    called = []

    def counted(*args):
        called.append(1)
        return product(*args)

    product = layers.linear.composed_product
    monkeypatch.setattr(layers.linear, "composed_product", counted)
    compiled(made(kind).base_model.model.up, backend="eager")(torch.randn(2, 5, 8))
    assert len(called) == products


@pytest.mark.filterwarnings("ignore")
@pytest.mark.implementation("torch")
@pytest.mark.parametrize("how", ["compiled", "dense"])
def test_autocast_leaves_the_norm_in_fp32(how):
    layer = made("branch").base_model.model.up

    def scale():
        return layers.scale.scale_of(layer, "default", differentiable=True, how=how)

    asked = compiled(scale, backend="eager") if how == "compiled" else scale
    expected = scale_in_float64(layer)
    with torch.autocast("cpu", torch.bfloat16):
        found = asked()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def scale_in_float64(layer):
    tensors = layer.get_base_layer().weight, *layer.factors("default"), layer.magnitude("default")
    weight, A, B, m = (t.detach().double() for t in tensors)
    return m / (weight + layer.scaling["default"] * B @ A).norm(dim=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.implementation("torch")
def test_a_checkpointed_graph_computes_the_norm_again():
    eager, model = made("branch"), made("branch")
    ids = torch.randint(0, 20, (2, 5))

    def checkpointed(ids):
        return torch.utils.checkpoint.checkpoint(model, ids, use_reentrant=False)

    compiled(checkpointed, backend="aot_eager")(ids).square().sum().backward()
    eager(ids).square().sum().backward()
    for found, expected in zip(model.parameters(), eager.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", ["load", "rescale", "refresh"])
def test_events_reach_a_compiled_model(change):
    model = made("branch").eval()
    fast, ids = compiled(model, backend="eager"), torch.randint(0, 20, (2, 5))
    with torch.no_grad():
        before = fast(ids)
        if change == "load":
            model.load_state_dict({k: v * 1.5 if "lora_B" in k else v for k, v in model.state_dict().items()})
        elif change == "rescale":
            model.base_model.model.up.scale_layer(2.0)
        else:
            model.base_model.model.up.lora_B["default"].weight.mul_(3)
            dora_peft.refresh(model)
        after = fast(ids)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, model(ids))


EDITS = {
    "A through .data": lambda layer: layer.lora_A["default"].weight.data.mul_(2),
    "B through .data": lambda layer: layer.lora_B["default"].weight.data.neg_(),
    "B by copy_": lambda layer: layer.lora_B["default"].weight.data.copy_(torch.randn(12, 3)),
    "A bound to new memory": lambda layer: setattr(layer.lora_A["default"].weight, "data", torch.randn(3, 8)),
    "all of W0": lambda layer: layer.get_base_layer().weight.data.mul_(2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.cached_norms
@pytest.mark.parametrize(("edit", "training", "warm"), pairs(EDITS, [True, False], [True, False]))
def test_a_compiled_model_follows_edits_that_no_event_tells(edit, training, warm):
    model = made("branch").train(training)
    ids = torch.randint(0, 20, (2, 5))
    if not warm:
        EDITS[edit](model.base_model.model.up)
    fast = compiled(model, backend="aot_eager")
    with torch.set_grad_enabled(training):
        before = fast(ids)
        if warm:
            EDITS[edit](model.base_model.model.up)
        found = fast(ids)
        assert torch.allclose(found, before) != warm
        with dora_peft.implementation("reference"):
            torch.testing.assert_close(found, model(ids))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def recorded(how, layer, x):
    if how == "export":
        return torch.export.export(layer, (x,)).module()
    if how == "strict export":
        return torch.export.export(layer, (x,), strict=True).module()
    return torch.jit.trace(layer, x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.cached_norms
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("how", ["export", "strict export", "jit"])
def test_a_recording_computes_the_norm_of_what_it_is_given(how, warm):
    """Also of another state dict than that of the moment of recording."""
    layer = made("branch").base_model.model.up.eval()
    x = torch.randn(2, 8)
    with torch.no_grad():
        if warm:
            layer(x)
        layer.lora_A["default"].weight.data.mul_(2)
        program = recorded(how, layer, x.flip(0))
        torch.testing.assert_close(program(x), layer(x))
        layer.lora_B["default"].weight.data.mul_(-3)
        layer.get_base_layer().weight.data.mul_(0.5)
        program.load_state_dict(layer.state_dict(), strict=False)
        torch.testing.assert_close(program(x), layer(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.cached_norms
@pytest.mark.parametrize(
    ("detach", "backend"),
    [
        (True, "aot_eager"),
        (False, "aot_eager"),
        pytest.param(True, "inductor", marks=pytest.mark.implementation("torch")),
        pytest.param(False, "inductor", marks=pytest.mark.slow),
    ],
)
def test_two_forward_passes_before_a_backward_pass(detach, backend):
    """A graph keeps the v that it was made with, though A changed since."""
    eager, model = (made("branch" if detach else "full gradient") for _ in range(2))
    fast = compiled(model, backend=backend)
    ids, others = torch.randint(0, 20, (2, 5)), torch.randint(0, 20, (2, 5))

    def gradients(one, forward):
        layer = one.base_model.model.up
        first = forward(ids).square().sum()
        layer.scaling["default"] *= -0.5
        second = forward(others).square().sum()
        layer.scaling["default"] /= -0.5
        (first + second).backward()
        return [p.grad for p in one.parameters() if p.requires_grad]

    with dora_peft.implementation("reference"):
        expected = gradients(eager, eager)
    for found, grad in zip(gradients(model, fast), expected, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_full_gradient_needs_a_dense_weight():
    torch.manual_seed(0)
    config = DoraConfig(r=2, target_modules=["0"], detach_norm=False)
    with pytest.warns(UserWarning, match="groups > 1"):
        model = get_peft_model(nn.Sequential(nn.Conv1d(4, 6, 1, groups=2)), config)
    with pytest.raises(Exception, match=r"detach_norm=False needs a dense weight.*'0'"):
        compiled(model, backend="eager")(torch.randn(2, 4, 5))


@pytest.mark.filterwarnings("ignore")
def test_generation_with_a_compiled_forward():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends, initializer_range=0.3))
    targets = ["q_proj", "down_proj"]
    config = DoraConfig(r=3, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    prompt = torch.randint(1, 32, (2, 5))
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(input_ids=prompt, **options)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=prompt, **options), expected)
    torch._dynamo.reset()
    base.forward = torch.compile(base.forward, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(model.generate(input_ids=prompt, **options), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor():
    eager, model = made("branch"), made("branch")
    ids = torch.randint(0, 20, (2, 5))
    fast = compiled(model)
    found, expected = fast(ids), eager(ids)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
