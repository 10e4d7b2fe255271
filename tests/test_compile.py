"""torch.compile: one graph, the results of eager, and a norm that follows the optimizer without a new compilation."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dora_peft
from dora_peft import DoraConfig, norm

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


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("kind", KINDS)
def test_training_in_one_graph(kind):
    eager, model = made(kind), made(kind)
    fast = compiled(model, backend="aot_eager", dynamic=True)
    lr = 1e-5 if kind == "bf16" else 1e-3  # roundings must not add up over the steps
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
        if kind != "dropout":  # whose masks eager draws in its own way
            tolerance = {"rtol": 3e-2, "atol": 3e-2} if kind == "bf16" else {"rtol": 1e-5, "atol": 0}
            torch.testing.assert_close(*losses, **tolerance)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        found, expected = fast.eval()(ids), eager.eval()(ids)
    torch.testing.assert_close(found, expected, **({"rtol": 3e-2, "atol": 3e-2} if kind == "bf16" else {}))


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


@pytest.mark.filterwarnings("ignore")
def test_a_norm_that_waits_for_its_refresh_gets_it_before_the_first_compilation(monkeypatch):
    """After an eager step the norm is refreshed by the next eager forward pass, which a compiled one is not."""
    monkeypatch.setattr(norm, "_lazy", True)
    model = made("branch")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(0, 20, (2, 5))

    def step(forward):
        optimizer.zero_grad()
        forward(ids).square().sum().backward()
        optimizer.step()

    step(model)
    assert model.base_model.model.up._norms["default"].stale
    fast = compiled(model, backend="aot_eager")
    for _ in range(2):
        found, expected = fast(ids), copy.deepcopy(model)(ids)
        torch.testing.assert_close(found, expected)
        step(model)  # an eager step, after which nothing runs before the compiled forward pass


@pytest.mark.filterwarnings("ignore")
def test_export_of_a_model_whose_norm_waits_for_its_refresh(monkeypatch):
    monkeypatch.setattr(norm, "_lazy", True)
    model = made("branch").base_model.model.up
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(2, 8)
    model(x).square().sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"out of date.*model\.eval\(\)"):
        torch.export.export(model, (x,), strict=False)
    exported = torch.export.export(model.eval(), (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), model(x))


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
    config = DoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    prompt = torch.randint(1, 32, (2, 5))
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(input_ids=prompt, **options)
    torch._dynamo.reset()
    base.forward = torch.compile(base.forward, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(model.generate(input_ids=prompt, **options), expected)
    assert not torch.equal(base.generate(prompt, **options), _without_adapter(model, prompt, options))


def _without_adapter(model, prompt, options):
    with model.disable_adapter():
        return model.generate(input_ids=prompt, **options)


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
            torch.testing.assert_close(a.grad, b.grad)
