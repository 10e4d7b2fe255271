"""A thousand merges and unmerges, as weight sync makes them between training steps: the base is the same to the bit.

TRL merges the adapter, hands the merged weights to its inference engine by name, and unmerges, at every sync. Where
unmerging subtracts and divides, the base drifts away in bf16 (TRL issue 6688).
"""

import importlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from layer_fixtures import MERGEABLE, adapted, dora, example, perturb
from model_fixtures import config, dora_layers, llama
from peft import get_peft_model
from quantised_fixtures import quantised, stored

# As users run: the checking mode computes every norm again.
pytestmark = pytest.mark.cached_norms
CYCLES = 1000
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensors):
    """Copies to compare as bits: 0 and -0, or two NaN, are different."""
    return {n: t.detach().clone().view(BITS[t.element_size()]) for n, t in tensors}


def of_base(model):
    return bits((n, p) for n, p in model.named_parameters() if "lora_" not in n)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@torch.no_grad()
def move_adapters(model, seed):
    """What a training step does: other A, B and m."""
    for layer in dora_layers(model).values():
        perturb(layer, "default", seed)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MERGEABLE)
def test_every_kind_of_layer(kind, dtype, safe_merge):
    model = adapted(kind, dtype)
    x, layer = example(model, grad=False), dora(model)
    base = layer.get_base_layer()
    weight, address, before = base.weight, base.weight.data_ptr(), of_base(model)
    with torch.no_grad():
        first = model(x)
        layer.merge(safe_merge=safe_merge)
        merged = base.weight.clone()
        assert not torch.equal(merged, weight)
        layer.unmerge()
        for _ in range(CYCLES):
            layer.merge(safe_merge=safe_merge)
            again = base.weight
            layer.unmerge()
        assert torch.equal(again, merged)
        assert torch.equal(model(x), first)
    assert (base.weight is weight, base.weight.data_ptr()) == (True, address)
    assert_same(of_base(model), before)


@pytest.mark.parametrize("bits_per_weight", [4, 8])
def test_quantised_bases(bits_per_weight):
    model = quantised(bits_per_weight)
    base, x = dora(model).get_base_layer(), torch.randn(3, 64)
    before, first = stored(base), model(x).detach()
    for cycle in range(CYCLES):
        model.merge_adapter()
        if cycle == 0:
            assert not torch.equal(stored(base)["data"], before["data"])
        model.unmerge_adapter()
    assert_same(stored(base), before)
    assert torch.equal(model(x).detach(), first)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.bfloat16, {}), (torch.float16, {"safe_merge": True}), (torch.bfloat16, {"offload_original": True})],
)
def test_a_llama_that_is_trained_in_between(dtype, options):
    model = get_peft_model(llama(num_hidden_layers=1).to(dtype), config(target_modules="all-linear"))
    before, parameters = of_base(model), {n: id(p) for n, p in model.named_parameters()}
    for cycle in range(CYCLES):
        if cycle % 100 == 0:
            move_adapters(model, cycle)
            assert_same(of_base(model), before)
        model.base_model.merge_adapter(**options)
        model.unmerge_adapter()
    assert_same(of_base(model), before)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters


def trls_generation():
    """TRL's class that syncs weights, without its engine."""
    try:
        module = importlib.import_module("trl.generation.vllm_generation")
    except ImportError as error:
        pytest.skip(f"no TRL with this class: {error}")
    return object.__new__(module.VLLMGeneration)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:trl")
def test_trls_own_sync():
    generation = trls_generation()
    model = get_peft_model(llama(num_hidden_layers=1).to(torch.bfloat16), config(target_modules="all-linear"))
    plain = {n: p.shape for n, p in llama(num_hidden_layers=1).named_parameters()}
    before, engine = of_base(model), {}

    def load_weights(weights):
        engine.update((name, weight.clone()) for name, weight in weights)

    runner = SimpleNamespace(model=SimpleNamespace(load_weights=load_weights))
    executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
    generation.model, generation.mode, generation.enable_sleep_mode = model, "colocate", False
    generation.accelerator = SimpleNamespace(is_main_process=True)
    generation._dist = SimpleNamespace(gather_params=lambda _: nullcontext(), is_fsdp=False)
    generation.llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_executor=executor), reset_prefix_cache=lambda: None
    )
    for cycle in range(CYCLES):
        if cycle % 250 == 0:
            move_adapters(model, cycle)
        generation.sync_weights()
        assert not any(layer.merged for layer in dora_layers(model).values())
    assert_same(of_base(model), before)
    # the engine has the merged weights, under the plain model's names
    assert {n: w.shape for n, w in engine.items()} == plain
    merged = model.merge_and_unload()
    assert_same(bits(engine.items()), bits(merged.named_parameters()))
    names = {n.replace("base_model.model.", "").replace(".base_layer", ""): t for n, t in before.items()}
    adapted_names = {n for n, t in bits(engine.items()).items() if not torch.equal(t, names[n])}
    assert adapted_names == {n for n in plain if "proj" in n}
