"""The life cycle: adapters are added, switched, mixed, merged, combined, swapped and taken away again."""

import copy
import io
import math
from contextlib import nullcontext

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter as peft_hotswap_adapter
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dora_peft import DoraConfig, DoraLayer, reference

IDS = torch.arange(12).view(2, 6)
OTHER_TYPES = ["linear", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "magnitude_prune"]


def llama(**changes):
    """A tiny Llama in float64, so that equal means equal to 1e-9, with weights large enough for adapters to show."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(**(sizes | heads | tokens | {"initializer_range": 0.3} | changes))
    return LlamaForCausalLM(config).double().eval()


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def mlp():
    torch.manual_seed(0)
    return Mlp().double().eval()


X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
NAMES = ("up", "down")


def config(**options):
    return DoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": list(NAMES)} | options))


def adapter_parameters(model, adapter):
    """lora_A, lora_B and magnitudes of one adapter, by name."""
    marks = (f".{adapter}.", f".{adapter}")
    return {n: p for n, p in model.named_parameters() if "lora_" in n and (marks[0] in n or n.endswith(marks[1]))}


@torch.no_grad()
def train(model, adapter="default", seed=1):
    """Move one adapter as training would: factors freely, magnitudes by some percent."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_parameters(model, adapter).items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.mul_(1 + 0.2 * noise) if "magnitude" in name else parameter.add_(0.3 * noise)
    return model.eval()


@torch.no_grad()
def output(model, *args, **kwargs):
    """Logits or outputs on fixed inputs of the model's own kind."""
    if not args:
        embeds = any(isinstance(m, nn.Embedding) for m in model.modules())
        args = (IDS,) if embeds else (X,)
    out = model(*args, **kwargs)
    return out if isinstance(out, torch.Tensor) else out.logits


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def differs(found, other):
    assert (found - other).abs().max() > 1e-4


def two_adapters(base=mlp, **options):
    model = train(get_peft_model(base(), config(**options)))
    model.add_adapter("second", config(**(options | {"r": 3, "lora_alpha": 5})))
    train(model, "second", seed=2)
    return model


def dense(layer, adapters):
    """W' of one layer by the reference: c_n (... c_1 (W0 + d_1) ... + d_n), each norm from W0."""
    weight = layer.original_weight().detach()
    merged = weight
    for name in adapters:
        lora_A, lora_B = (t.detach() for t in layer.factors(name))
        magnitude, scaling = layer.lora_magnitude_vector[name].weight.detach(), layer.scaling[name]
        c = magnitude / reference.weight_norm(weight, lora_A, lora_B, scaling)
        merged = c[:, None] * (merged + scaling * lora_B @ lora_A)
    return merged


def dora_layers(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, DoraLayer)}


def dense_output(model, adapters):
    """The output of a fresh base whose adapted weights are the reference's."""
    plain = mlp()
    with torch.no_grad():
        for name, layer in dora_layers(model).items():
            plain.get_submodule(name).weight.copy_(dense(layer, adapters))
    return output(plain)


# ---- several adapters


def test_a_new_adapter_changes_nothing():
    model = get_peft_model(mlp(), config())
    same(output(model), output(mlp()))
    model.add_adapter("second", config(init_lora_weights="gaussian"))
    model.set_adapter("second")
    same(output(model), output(mlp()))


def test_set_adapter_switches_outputs_and_gradients():
    model = two_adapters()
    first = output(model)
    same(first, dense_output(model, ["default"]))
    model.set_adapter("second")
    same(output(model), dense_output(model, ["second"]))
    differs(output(model), first)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(model, "second"))
    model.set_adapter("default")
    assert torch.equal(output(model), first)


def test_a_second_adapter_is_not_trained_until_it_is_active():
    model = two_adapters()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model, "default"))


def test_disabled_adapters_leave_the_base():
    model = two_adapters()
    adapted = output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), output(mlp()))
    assert torch.equal(output(model), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model), output(mlp()))


def test_disabling_is_undone_by_an_error_inside():
    model = train(get_peft_model(mlp(), config()))
    adapted = output(model)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(output(model), adapted)


def test_delete_an_inactive_adapter():
    model = two_adapters()
    before = output(model)
    model.delete_adapter("second")
    assert torch.equal(output(model), before)
    assert not adapter_parameters(model, "second")
    assert list(model.peft_config) == ["default"]
    for layer in dora_layers(model).values():
        held = [getattr(layer, n) for n in (*layer.adapter_layer_names, *layer.other_param_names)]
        assert not any("second" in attribute for attribute in held)
        assert "second" not in layer._norms


def test_delete_the_active_adapter():
    model = two_adapters()
    model.set_adapter("second")
    expected = output(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="default"):
        model.delete_adapter("default")
    assert all(layer.active_adapters == ["second"] for layer in dora_layers(model).values())
    assert torch.equal(output(model), expected)


def test_delete_the_last_adapter_leaves_the_base():
    model = train(get_peft_model(mlp(), config()))
    model.delete_adapter("default")
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert torch.equal(output(model.base_model), output(mlp()))


@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
@pytest.mark.parametrize("base", [mlp, llama])
def test_several_active_adapters_agree_in_training_evaluation_and_merging(base, order):
    targets = {"target_modules": list(NAMES) if base is mlp else ["q_proj", "up_proj"]}
    model = two_adapters(base, **targets)
    model.base_model.set_adapter(order)
    evaluated = output(model)
    trained = output(model.train())
    same(trained, evaluated)
    if base is mlp:
        same(evaluated, dense_output(model, order))
    model.eval().merge_adapter(order)
    same(output(model), evaluated)
    for layer in dora_layers(model).values():
        same(layer.get_base_layer().weight, dense(layer, order))
    model.unmerge_adapter()
    same(output(model), evaluated)


def test_adapters_merged_one_after_the_other_compose_alike():
    model = two_adapters()
    together = copy.deepcopy(model)
    together.merge_adapter(["default", "second"])
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    assert torch.equal(output(model), output(together))
    model.unmerge_adapter()
    for name in NAMES:
        assert torch.equal(dora_layers(model)[name].get_base_layer().weight, mlp().get_submodule(name).weight)


def test_several_active_adapters_train_together():
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    model.train()(X).square().sum().backward()
    for adapter in ("default", "second"):
        for name, parameter in adapter_parameters(model, adapter).items():
            assert parameter.grad.abs().max() > 0, name


def test_several_active_adapters_refuse_the_papers_dropout_by_name():
    model = two_adapters(dropout_mode="paper", lora_dropout=0.5)
    with pytest.raises(ValueError, match=r"Adapter 'default' uses dropout_mode='paper'.*dropout_mode='branch'"):
        model.base_model.set_adapter(["default", "second"])


# ---- mixed batches


@pytest.mark.parametrize("base", [mlp, llama])
def test_a_mixed_batch_is_each_sample_with_its_own_adapter(base):
    targets = list(NAMES) if base is mlp else ["embed_tokens", "q_proj", "down_proj"]
    model = two_adapters(base, target_modules=targets)
    inputs = X if base is mlp else torch.arange(24).view(4, 6)
    names = ["second", "__base__", "default", "second"]
    mixed = output(model, inputs, adapter_names=names)
    for index, name in enumerate(names):
        sample = inputs[index : index + 1]
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else nullcontext():
            same(mixed[index : index + 1], output(model, sample))
    differs(mixed[0], mixed[3])


def test_a_mixed_batch_generates_with_beams():
    model = two_adapters(llama, target_modules=["q_proj", "down_proj"])
    prompts = torch.arange(12).view(3, 4) + 1
    names = ["__base__", "default", "second"]
    for options in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(3, 4), **options}
        mixed = model.generate(input_ids=prompts, adapter_names=names, **options)
        alone = []
        options["attention_mask"] = torch.ones(1, 4)
        for index, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
            with model.disable_adapter() if name == "__base__" else nullcontext():
                alone.append(model.generate(input_ids=prompts[index : index + 1], **options))
        assert torch.equal(mixed, torch.cat(alone))
        assert len({tuple(row[4:].tolist()) for row in mixed}) > 1


def test_a_mixed_batch_leaves_no_hooks_behind():
    model = two_adapters()
    before = output(model)
    with pytest.raises(ValueError, match=r"Length of `adapter_names`.*2 and 4"):
        output(model, X, adapter_names=["default", "second"])
    assert torch.equal(output(model), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_a_mixed_batch_cannot_do_is_refused():
    model = two_adapters()
    names = ["default"] * len(X)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): third"):
        output(model, X, adapter_names=["third", *names[1:]])
    with pytest.raises(ValueError, match="training mode"):
        output(model.train(), X, adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        output(model, X, adapter_names=names)


# ---- merging


MERGES = [{}, {"safe_merge": True}, {"offload_original": True}]


def unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    return all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


@pytest.mark.parametrize("options", MERGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merge_and_unmerge_restore_every_bit(options, dtype):
    model = get_peft_model(llama().to(dtype), config(target_modules="all-linear"))
    train(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = {n: id(p) for n, p in model.named_parameters()}
    expected = output(model)
    model.merge_adapter(**options)
    assert not unchanged(model, before)
    if dtype == torch.float64:
        same(output(model), expected)
    model.unmerge_adapter()
    assert unchanged(model, before)
    assert torch.equal(output(model), expected)
    # optimizers and sharders hold on to the parameters themselves
    assert {n: id(p) for n, p in model.named_parameters()} == parameters


def test_merged_rows_have_the_magnitude_as_norm():
    model = train(get_peft_model(mlp(), config()))
    model.merge_adapter()
    for layer in dora_layers(model).values():
        weight = layer.get_base_layer().weight
        same(weight.norm(dim=1), layer.lora_magnitude_vector["default"].weight.detach().abs())


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_weight_is_untied_with_a_warning_and_tied_again(target):
    base = llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="tie"):  # PEFT's own, at creation
        model = get_peft_model(base, config(target_modules=[target]))
    train(model)
    expected = output(model)  # the magnitude of the padding token's zero row follows its norm from here
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match=rf"unties module '[\w.]*{target}'"):
        model.merge_adapter()
    tables = [base.get_input_embeddings(), base.get_output_embeddings()]
    first, second = (getattr(t, "base_layer", t).weight for t in tables)
    assert first is not second
    same(output(model), expected)
    model.unmerge_adapter()
    first, second = (getattr(t, "base_layer", t).weight for t in tables)
    assert first is second
    assert unchanged(model, before)


def test_merge_and_unload_returns_a_plain_model():
    model = train(get_peft_model(llama(), config(target_modules="all-linear")))
    expected = output(model)
    plain = model.merge_and_unload()
    assert isinstance(plain, LlamaForCausalLM)
    assert not dora_layers(plain)
    assert plain.state_dict().keys() == llama().state_dict().keys()
    same(output(plain), expected)


def test_merge_and_unload_of_chosen_adapters():
    model = two_adapters()
    expected = dense_output(model, ["second"])
    same(output(model.merge_and_unload(adapter_names=["second"])), expected)


def test_unload_returns_the_base():
    model = train(get_peft_model(llama(), config(target_modules="all-linear")))
    plain = model.unload()
    assert unchanged(plain, llama().state_dict())


def test_safe_merge_refuses_a_broken_adapter_before_touching_the_base():
    model = train(get_peft_model(mlp(), config()))
    layer = dora_layers(model)["down"]
    with torch.no_grad():
        layer.lora_B["default"].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*default.*down"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, mlp().down.weight)
    assert not layer.merged


def test_an_adapter_added_while_another_is_merged_starts_from_the_base():
    model = train(get_peft_model(mlp(), config()))
    model.merge_adapter()
    for layer in dora_layers(model).values():
        layer.update_layer("second", r=3, lora_alpha=3, config=config())
        assert layer.merged
    model.unmerge_adapter()
    for name, layer in dora_layers(model).items():
        same(layer.lora_magnitude_vector["second"].weight.detach(), mlp().get_submodule(name).weight.norm(dim=1))


def test_adding_an_adapter_to_a_merged_model_unmerges_it():
    """PEFT activates adapters of unmerged models only, and says so."""
    model = train(get_peft_model(mlp(), config()))
    expected = output(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", config(r=3))
    assert torch.equal(output(model), expected)
    model.set_adapter("second")
    same(output(model), output(mlp()))


def test_merging_twice_warns_and_changes_nothing():
    model = train(get_peft_model(mlp(), config()))
    model.merge_adapter()
    merged = output(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(output(model), merged)


def test_unmerging_what_is_not_merged_changes_nothing():
    model = train(get_peft_model(mlp(), config()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.unmerge_adapter()
    assert unchanged(model, before)


def test_a_merged_model_moves_and_casts_with_its_original():
    model = train(get_peft_model(mlp(), config()))
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    for name, layer in dora_layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, mlp().get_submodule(name).weight.float())


def test_replicated_layers_have_adapters_of_their_own_and_merge_apart():
    model = get_peft_model(llama(), config(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]))
    train(model)
    layers = list(dora_layers(model).values())
    assert len(layers) == 4
    assert layers[0].base_layer.weight is layers[2].base_layer.weight
    assert layers[0].lora_A["default"].weight is not layers[2].lora_A["default"].weight
    expected = output(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="unties module"):
        model.merge_adapter()
    same(output(model), expected)
    model.unmerge_adapter()
    assert unchanged(model, before)
    assert layers[0].base_layer.weight is layers[2].base_layer.weight


# ---- what is adapted and trained


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_which_biases_are_trained(bias):
    model = get_peft_model(mlp(), config(bias=bias))
    trained = {n.split(".")[2] for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad}
    assert trained == {"none": set(), "all": {"up", "head"}, "lora_only": {"up"}}[bias]


def test_modules_to_save_are_trained_and_switched():
    model = get_peft_model(mlp(), config(modules_to_save=["head"]))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trainable if "head" in n} == {
        f"base_model.model.head.modules_to_save.default.{n}" for n in ("weight", "bias")
    }
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].bias.add_(1)
    same(output(model), output(mlp()) + 1)
    with model.disable_adapter():
        same(output(model), output(mlp()))


def test_trainable_tokens():
    config_ = config(target_modules=["q_proj"], trainable_token_indices=[1, 5])
    model = get_peft_model(llama(), config_)
    same(output(model), output(llama()))
    parameters = {n: p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
    assert [p.shape for p in parameters.values()] == [(2, 16)]
    with torch.no_grad():
        next(iter(parameters.values())).add_(1)
    changed = (output(model) - output(llama())).abs().amax(-1) > 1e-9
    # a causal model changes from the first such token on
    assert changed[0].tolist() == [False, *[True] * 5]
    train(model)
    expected = output(model)
    plain = model.merge_and_unload()
    same(output(plain), expected)


def test_trained_tokens_of_a_targeted_embedding_are_refused():
    """PEFT's LoRA refuses it as well: the rows would be trained twice."""
    base = llama()
    with pytest.raises(TypeError, match="trainable_token_indices cannot be applied to modules of type"):
        get_peft_model(base, config(target_modules=["embed_tokens"], trainable_token_indices=[1]))
    assert not dora_layers(base)
    same(output(base), output(llama()))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
        ({"target_modules": r".*\.1\..*(q|up)_proj"}, {"layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {"layers.1.self_attn.q_proj"}),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            {"layers.0.self_attn.q_proj"},
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, {"layers.1.self_attn.q_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": ["o_proj"]}, None),
        ({"target_modules": None}, {f"layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"}),
    ],
)
def test_which_modules_are_adapted(options, expected):
    base = llama()
    if expected is None:
        linear = {n for n, m in base.named_modules() if isinstance(m, nn.Linear)}
        expected = {n.removeprefix("model.") for n in linear if n != "lm_head" and "o_proj" not in n}
    found = {n.removeprefix("model.") for n in dora_layers(get_peft_model(base, config(**options)))}
    assert found == expected


def test_rank_and_alpha_patterns():
    patterns = {"rank_pattern": {"v_proj": 1, "layers.1.self_attn.q_proj": 4}, "alpha_pattern": {"q_proj": 7}}
    model = get_peft_model(llama(), config(target_modules=["q_proj", "v_proj"], **patterns))
    found = {n.removeprefix("model."): (m.r["default"], m.scaling["default"]) for n, m in dora_layers(model).items()}
    assert found == {
        "layers.0.self_attn.q_proj": (2, 7 / 2),
        "layers.0.self_attn.v_proj": (1, 3 / 1),
        "layers.1.self_attn.q_proj": (4, 7 / 4),
        "layers.1.self_attn.v_proj": (1, 3 / 1),
    }


def test_rslora_scales_by_the_root_of_the_rank():
    model = get_peft_model(mlp(), config(use_rslora=True))
    assert {layer.scaling["default"] for layer in dora_layers(model).values()} == {3 / math.sqrt(2)}


@pytest.mark.parametrize(
    ("targets", "only", "expected"),
    [
        (["q_proj"], ["up_proj", "v_proj"], {"up_proj", "v_proj"}),
        (r".*\.q_proj", r".*\.(up|v)_proj", {"up_proj", "v_proj"}),
        (["q_proj", "up_proj"], ["up_proj"], {"up_proj"}),  # they take precedence
        (None, ["up_proj"], {"up_proj"}),  # target_modules: the architecture's default
        (["q_proj"], "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_magnitude_only_modules_train_m_alone(targets, only, expected):
    model = get_peft_model(llama(), config(target_modules=targets, magnitude_only_modules=only))
    same(output(model), output(llama()))
    model(IDS).logits.square().sum().backward()
    seen = set()
    for name, layer in dora_layers(model).items():
        short = name.rpartition(".")[2]
        lora_A, lora_B = layer.factor_parameters("default")
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert magnitude.grad.abs().max() > 0, name
        if short in expected:
            seen.add(short)
            assert not lora_A.requires_grad
            assert not lora_B.requires_grad
            assert not lora_A.any()
            assert not lora_B.any()
        else:
            assert lora_B.grad.abs().max() > 0, name
    assert seen == expected
    # switching adapters must not set the zero factors free
    model.add_adapter("second", config(target_modules=["q_proj"]))
    model.set_adapter("second")
    model.set_adapter("default")
    for layer in dora_layers(model).values():
        only_m = layer.magnitude_only["default"]
        assert layer.factor_parameters("default")[0].requires_grad is not only_m
    with torch.no_grad():
        for layer in dora_layers(model).values():
            layer.lora_magnitude_vector["default"].weight.mul_(1.1)
    expected_output = output(model)
    differs(expected_output, output(llama()))
    model.merge_adapter()
    same(output(model), expected_output)


# ---- weighted sums


def combined(model, weights):
    """W0 + sum_i w_i (W'_i - W0) per adapted module, by the reference."""
    out = {}
    for name, layer in dora_layers(model).items():
        parts = [
            (
                *(t.detach() for t in layer.factors(adapter)),
                layer.lora_magnitude_vector[adapter].weight.detach(),
                layer.scaling[adapter],
            )
            for adapter in weights
        ]
        out[name] = reference.weighted_sum(layer.original_weight().detach(), parts, list(weights.values()))
    return out


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.5, -0.5), (-1.0, 0.25), (1.0, 0.0)])
def test_a_weighted_sum_is_the_references(weights, kind, rslora):
    model = two_adapters(use_rslora=rslora)
    weights = dict(zip(("default", "second"), weights, strict=True))
    expected = combined(model, weights)
    full_rank = 5 if kind == "svd" else None  # r = 2 and 3: nothing is cut off
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type=kind, svd_rank=full_rank)
    for name, layer in dora_layers(model).items():
        same(dense(layer, ["sum"]), expected[name])
    model.set_adapter("sum")
    same(output(model), dense_output(model, ["sum"]))
    model.merge_adapter()
    for name, layer in dora_layers(model).items():
        same(layer.get_base_layer().weight, expected[name])


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_one_adapter_of_weight_one_is_itself(kind):
    model = two_adapters()
    expected = output(model)
    model.add_weighted_adapter(["default"], [1.0], "copy", combination_type=kind)
    model.set_adapter("copy")
    same(output(model), expected)


def test_a_weighted_sum_is_saved_and_loaded(tmp_path):
    model = two_adapters()
    model.add_weighted_adapter(["default", "second"], [0.7, -0.3], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(mlp(), tmp_path / "sum")
    same(output(loaded.eval()), output(model))


def test_a_weighted_sum_of_adapters_with_different_modules():
    model = train(get_peft_model(mlp(), config(target_modules=["up"])))
    model.add_adapter("second", config(r=3, target_modules=["down"]))
    train(model, "second", seed=2)
    weights = {"default": 0.5, "second": 2.0}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    for name, adapter in (("up", "default"), ("down", "second")):
        layer = dora_layers(model)[name]
        weight = layer.original_weight().detach()
        same(dense(layer, ["sum"]), weight + weights[adapter] * (dense(layer, [adapter]) - weight))


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_combinations_of_the_factors_alone_are_refused_with_the_reason(kind):
    model = two_adapters()
    with pytest.raises(ValueError, match=rf"'cat' and 'svd' for DoRA, found '{kind}'.*not linear in A and B"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type=kind, density=0.5)
    assert "sum" not in model.peft_config
    assert not adapter_parameters(model, "sum")


@pytest.mark.parametrize(
    ("names", "weights"), [(["default", "third"], [1.0, 1.0]), (["default"], [1.0, 2.0]), ([], [])]
)
def test_a_weighted_sum_needs_existing_adapters_and_as_many_weights(names, weights):
    model = two_adapters()
    with pytest.raises(ValueError, match="Expected existing adapters"):
        model.add_weighted_adapter(names, weights, "sum")
    assert "sum" not in model.peft_config


# ---- hot-swapping


def saved_second(folder, **options):
    """Another adapter for the same modules, saved; returns its outputs."""
    model = train(get_peft_model(mlp(), config(**options)), seed=5)
    model.save_pretrained(folder)
    return output(model)


def test_hotswap_replaces_tensors_scaling_and_outputs(tmp_path):
    expected = saved_second(tmp_path, lora_alpha=9)
    model = train(get_peft_model(mlp(), config()))
    differs(output(model), expected)
    parameters = {n: id(p) for n, p in model.named_parameters()}
    model.hotswap_adapter(str(tmp_path))
    same(output(model), expected)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert model.peft_config["default"].lora_alpha == 9
    model.save_pretrained(tmp_path / "again")
    same(output(PeftModel.from_pretrained(mlp(), tmp_path / "again").eval()), expected)


@pytest.mark.parametrize(
    ("within", "change"),
    [
        (
            "dora_peft.adapters.combine._fill_layer",
            lambda model, _: model.add_weighted_adapter(["default"], [2.0], "sum"),
        ),
        ("dora_peft.adapters.hotswap.from_checkpoint", lambda model, folder: model.hotswap_adapter(str(folder))),
        ("peft.peft_model.load_peft_weights", PeftModel.from_pretrained),
    ],
    ids=["weighted sum", "hotswap", "load"],
)
def test_an_interrupted_change_leaves_the_model_as_it_was(within, change, tmp_path, monkeypatch):
    """Ctrl-C in the middle, which is no Exception."""
    saved_second(tmp_path, lora_alpha=9)
    # by name: registering again patches the method anew
    model = mlp() if change.__name__ == "from_pretrained" else train(get_peft_model(mlp(), config()))
    before, modules, adapters = (
        output(model),
        [type(m) for m in model.modules()],
        list(getattr(model, "peft_config", ())),
    )

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(within, interrupt)
    with pytest.raises(KeyboardInterrupt):
        change(model, tmp_path)
    same(output(model), before)
    assert [type(m) for m in model.modules()] == modules
    assert list(getattr(model, "peft_config", ())) == adapters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4}, "same tensors of the same shapes"),
        ({"target_modules": ["up"]}, "same tensors of the same shapes"),
        ({"target_modules": ["up", "down", "head"]}, "same tensors of the same shapes"),
        ({"use_rslora": True}, "use_rslora is False and True"),
        ({"lora_dropout": 0.5}, "lora_dropout is 0.0 and 0.5"),
        ({"dropout_mode": "paper"}, "dropout_mode is 'branch' and 'paper'"),
    ],
)
def test_a_hotswap_that_does_not_fit_leaves_the_old_adapter(options, message, tmp_path):
    saved_second(tmp_path, **options)
    model = train(get_peft_model(mlp(), config()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = output(model)
    with pytest.raises(ValueError, match=message):
        model.hotswap_adapter(str(tmp_path))
    assert unchanged(model, before)
    assert torch.equal(output(model), expected)


def test_a_merged_adapter_is_not_swapped(tmp_path):
    saved_second(tmp_path)
    model = train(get_peft_model(mlp(), config()))
    model.merge_adapter()
    before = output(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.hotswap_adapter(str(tmp_path))
    assert torch.equal(output(model), before)


def test_pefts_own_hotswap_refuses_dora_by_name(tmp_path):
    saved_second(tmp_path)
    model = train(get_peft_model(mlp(), config()))
    before = output(model)
    with pytest.raises(ValueError, match=r"Hotswapping only supports.*DORA"):
        peft_hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(output(model), before)


# ---- PEFT's helpers


@pytest.mark.parametrize("factor", [0.0, 0.5, 2])
def test_rescaling_equals_a_model_of_that_scaling(factor):
    model = train(get_peft_model(mlp(), config()))
    before = output(model)
    other = train(get_peft_model(mlp(), config(lora_alpha=3 * factor)))
    with rescale_adapter_scale(model, factor):
        same(output(model), output(other))
        same(output(model), dense_output(model, ["default"]))
        differs(output(model), before)
    assert torch.equal(output(model), before)


def test_conversion_to_lora_at_full_rank_gives_the_merged_outputs(tmp_path):
    model = train(get_peft_model(mlp(), config()))
    expected = output(model)
    lora_config, tensors = peft.convert_to_lora(model, rank=6)
    assert lora_config.r == 6
    assert not lora_config.use_dora
    plain = get_peft_model(mlp(), lora_config)
    result = peft.set_peft_model_state_dict(plain, tensors)
    assert not result.unexpected_keys
    # "up" has rank 6 at most and is exact; "down" (8 x 10) is cut at 6
    layer = plain.base_model.model.up
    torch.testing.assert_close(
        layer.base_layer.weight + layer.get_delta_weight("default"), dense(dora_layers(model)["up"], ["default"]),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    peft.save_as_lora(tmp_path, model, rank=1.0)
    whole = PeftModel.from_pretrained(mlp(), tmp_path).eval()
    assert type(whole.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(output(whole), expected, rtol=1e-5, atol=1e-5)


def test_status_reports():
    model = two_adapters()
    status = get_model_status(model)
    assert status.peft_types == {"default": "DORA", "second": "DORA"}
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False}
    assert status.num_adapter_layers == len(NAMES)
    assert {layer.name for layer in get_layer_status(model)} == {f"model.{n}" for n in NAMES}
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]


def test_loraplus_groups_are_those_of_pefts_dora():
    def rates(model):
        optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.25, loraplus_lr_ratio=4)
        groups = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        return {name: groups[id(p)] for name, p in adapter_parameters(model, "default").items()}

    ours = rates(get_peft_model(mlp(), config()))
    theirs = rates(get_peft_model(mlp(), LoraConfig(r=2, target_modules=list(NAMES), use_dora=True)))
    assert ours == theirs
    assert {rate for name, (rate, _) in ours.items() if "lora_A" in name} == {0.25}
    assert {rate for name, (rate, _) in ours.items() if "lora_B" in name} == {1.0}


# ---- moving, copying, memory


def test_deepcopy_is_independent():
    model = train(get_peft_model(mlp(), config()))
    expected = output(model)
    clone = copy.deepcopy(model)
    assert torch.equal(output(clone), expected)
    train(clone, seed=7)
    differs(output(clone), expected)
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_torch_save_of_the_whole_model(merged):
    model = train(get_peft_model(mlp(), config()))
    expected = output(model)
    if merged:
        model.merge_adapter()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    same(output(loaded), expected)
    loaded.unmerge_adapter()
    for name, layer in dora_layers(loaded).items():
        assert torch.equal(layer.get_base_layer().weight, mlp().get_submodule(name).weight)


def test_low_cpu_mem_usage_loads_to_the_same_outputs(tmp_path):
    expected = saved_second(tmp_path)
    model = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(p.is_meta for p in model.parameters())
    same(output(model), expected)
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    same(output(model.eval()), expected)


def test_a_meta_base_gets_a_meta_adapter_that_can_be_filled():
    with torch.device("meta"):
        base = Mlp().double()
    model = get_peft_model(base, config())
    assert all(p.is_meta for p in model.parameters())
    filled = train(get_peft_model(mlp(), config()))
    model.load_state_dict(filled.state_dict(), assign=True)
    same(output(model.eval()), output(filled))


# transformers has renamed it in 5.23; the old name works from 5.0 on
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    def gradients(checkpointing):
        model = get_peft_model(llama(), config(target_modules="all-linear"))
        train(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    expected, found = gradients(False), gradients(True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        same(found[name], gradient)


# ---- without get_peft_model


# PEFT 0.20 only: it looks for the config of a base model without a name
@pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")
def test_transformers_own_adapter_methods(tmp_path):
    base = llama()
    base.add_adapter(config(target_modules=["q_proj", "up_proj"]))
    same(output(base), output(llama()))
    train(base)
    expected = output(base)
    base.disable_adapters()
    same(output(base), output(llama()))
    base.enable_adapters()
    same(output(base), expected)
    assert base.active_adapters() == ["default"]
    base.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(str(tmp_path))
    assert type(again.peft_config["default"]) is DoraConfig
    same(output(again), expected)
    with pytest.warns(UserWarning, match="multiple adapters in the model"):
        again.add_adapter(config(target_modules=["v_proj"]), "second")
    again.set_adapter("second")
    same(output(again), output(llama()))
    again.set_adapter("default")
    same(output(again), expected)


def test_injected_into_a_bare_module():
    model = inject_adapter_in_model(config(), mlp())
    same(output(model), output(mlp()))
    assert set(dora_layers(model)) == set(NAMES)
    train(model)
    differs(output(model), output(mlp()))
