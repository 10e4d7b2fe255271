"""peft.utils.hotswap on DoRA models: other ranks and alphas, compiled models, PEFT's own use_dora folders."""

import json
from pathlib import Path

import pytest
import torch
from layer_fixtures import KINDS, One, adapted, distance, dora, example, expected_warning, perturb
from model_fixtures import IDS, config, differs, llama, mlp, output, same, saved_second, train, unchanged
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from dora_peft import DoraConfig


def saved(folder, kind, seed, **options):
    """A trained adapter of a layer of this kind in a folder, and its output."""
    model = adapted(kind, torch.float64, **options).double()
    perturb(dora(model), "default", seed)
    model.eval().save_pretrained(folder)
    return model(example(model)).detach()


@pytest.mark.parametrize("r", [2, 4])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "conv2d-depthwise"])
def test_a_round_trip_of_every_kind(kind, r, tmp_path):
    first = saved(tmp_path / "first", kind, 3)
    second = saved(tmp_path / "second", kind, 4, r=r, lora_alpha=7)
    assert distance(second, first) > 1e-2
    model = adapted(kind, torch.float64).double().eval()
    x, parameters = example(model), {n: id(p) for n, p in model.named_parameters()}
    for folder, expected in (("second", second), ("first", first), ("second", second)):
        hotswap_adapter(model, str(tmp_path / folder), "default", torch_device="cpu")
        assert distance(model(x), expected) < 1e-9
        assert {n: id(p) for n, p in model.named_parameters()} == parameters
    # what is saved now has the model's rank, and the same output
    model.save_pretrained(tmp_path / "again")
    with expected_warning(dora(model).get_base_layer()):
        again = PeftModel.from_pretrained(model.unload(), tmp_path / "again").double().eval()
    assert distance(again(x), second) < 1e-9


def test_the_tuners_own_method_takes_a_smaller_rank(tmp_path):
    expected = saved_second(tmp_path, r=1, lora_alpha=5)
    model = train(get_peft_model(mlp(), config()))
    model.hotswap_adapter(str(tmp_path))
    same(output(model), expected)
    assert model.peft_config["default"].r == 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "patterns", [{}, {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 11}}], ids=["", "patterns"]
)
def test_other_ranks_and_alphas_without_compiling_again(compiled, patterns, tmp_path):
    expected = {}
    for r, alpha in ((1, 4), (2, 9), (5, 1)):
        folder = str(tmp_path / str(r))
        expected[folder] = saved_second(folder, r=r, lora_alpha=alpha, **(patterns if r == 5 else {}))
    model = train(get_peft_model(mlp(), config()))
    before = output(model)
    prepare_model_for_compiled_hotswap(model, target_rank=5, config=model.peft_config)
    same(output(model), before)
    compilations = []

    def backend(graph, inputs):
        compilations.append(1)
        return graph

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
    same(output(run), before)
    for folder in [*expected, *expected]:
        hotswap_adapter(run, folder, adapter_name="default", torch_device="cpu")
        same(output(run), expected[folder])
        # the eager layers of the same model
        same(output(model), expected[folder])
    assert len(compilations) == compiled
    model.save_pretrained(tmp_path / "again")
    assert model.peft_config["default"].r == 5
    same(output(PeftModel.from_pretrained(mlp(), tmp_path / "again").eval()), expected[folder])


def with_zero_rows():
    model = llama().float()
    model.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    return model


def called(model, training, grad, ids=IDS):
    model.train(training)
    with torch.set_grad_enabled(grad):
        return model(ids).logits.detach().clone()


# of the compiler's own
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("training", "grad"), [(False, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["one", "beside another"])
def test_a_compiled_model_follows_every_swap(several, training, grad, tmp_path):
    """As a fresh load of each adapter gives it: v, c, ties and folded factors are those of the adapter swapped in."""
    options = {"target_modules": ["q_proj", "down_proj"]}

    def beside(model):
        if several:
            torch.manual_seed(9)
            model.add_adapter("other", config(**options, r=3))
            train(model, "other", 2).base_model.set_adapter(["default", "other"])
        return model

    expected = {}
    for r, alpha in ((1, 3), (2, 9), (5, 7)):
        folder = str(tmp_path / str(r))
        train(get_peft_model(with_zero_rows(), config(**options, r=r, lora_alpha=alpha)), seed=r).save_pretrained(
            folder
        )
        fresh = beside(PeftModel.from_pretrained(with_zero_rows(), folder, is_trainable=True))
        expected[folder] = called(fresh, training, grad)
    model = beside(train(get_peft_model(with_zero_rows(), config(**options))))
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    called(run, training, grad)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for folder in [*expected, *expected]:
            hotswap_adapter(run, folder, adapter_name="default", torch_device="cpu")
            torch.testing.assert_close(called(run, training, grad), expected[folder], rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_swap_that_fails_leaves_the_compiled_graph(tmp_path):
    saved_second(tmp_path / "larger", r=8, lora_alpha=9)
    expected = saved_second(tmp_path / "fits", r=1, lora_alpha=9)
    model = train(get_peft_model(mlp(), config()))
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager", fullgraph=True)
    before = output(run)
    with torch._dynamo.config.patch(error_on_recompile=True):
        with pytest.raises(ValueError, match=r"target_rank=\.\.\."):
            hotswap_adapter(run, str(tmp_path / "larger"), adapter_name="default", torch_device="cpu")
        assert torch.equal(output(run), before)
        hotswap_adapter(run, str(tmp_path / "fits"), adapter_name="default", torch_device="cpu")
        same(output(run), expected)


def test_a_prepared_model_is_saved_with_its_own_output(tmp_path):
    """PEFT leaves lora_alpha as it was, which at another rank is another scaling; and no config has to be passed."""
    model = train(get_peft_model(mlp(), config(rank_pattern={"up": 3}, use_rslora=True)))
    expected = output(model)
    prepare_model_for_compiled_hotswap(model, target_rank=7)
    same(output(model), expected)
    model.save_pretrained(tmp_path)
    same(output(PeftModel.from_pretrained(mlp(), tmp_path).eval()), expected)


def test_a_prepared_model_trains_merges_and_rescales():
    def trained(prepare):
        model = train(get_peft_model(mlp(), config())).train()
        if prepare:
            prepare_model_for_compiled_hotswap(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)).square().sum().backward()
            optimizer.step()
        model.base_model.model.up.set_scale("default", 0.5)
        model.base_model.model.down.scale_layer(3.0)
        results = [output(model.eval())]
        model.merge_adapter()
        return [*results, output(model)]

    for found, expected in zip(trained(True), trained(False), strict=True):
        same(found, expected)


def test_pefts_own_use_dora_folder(tmp_path):
    model = get_peft_model(mlp(), LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"], use_dora=True))
    train(model).save_pretrained(tmp_path)
    expected = output(model)
    assert "dora_peft" not in (Path(tmp_path) / "adapter_config.json").read_text()
    ours = train(get_peft_model(mlp(), config()), seed=7)
    differs(output(ours), expected)
    hotswap_adapter(ours, str(tmp_path), "default", torch_device="cpu")
    same(output(ours), expected)


def test_magnitude_only_modules_stay_as_they_are(tmp_path):
    options = {"target_modules": ["down"], "magnitude_only_modules": ["up"]}
    expected = saved_second(tmp_path, **options)
    model = train(get_peft_model(mlp(), config(**options)))
    prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config)
    assert model.base_model.model.up.lora_A["default"].weight.shape == (1, 6)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    same(output(model), expected)
    model.save_pretrained(tmp_path / "again")
    same(output(PeftModel.from_pretrained(mlp(), tmp_path / "again").eval()), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4}, r"target_rank=\.\.\."),
        ({"target_modules": ["up"]}, "same tensors of the same shapes"),
        ({"use_rslora": True}, "use_rslora"),
        ({"lora_dropout": 0.5}, "lora_dropout"),
        ({"dropout_mode": "paper"}, "dropout_mode"),
    ],
)
def test_what_does_not_fit_leaves_the_old_adapter(options, message, tmp_path):
    saved_second(tmp_path, **options)
    model = train(get_peft_model(mlp(), config()))
    prepare_model_for_compiled_hotswap(model)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, output(model)
    scaling = float(model.base_model.model.up.scaling["default"])
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert unchanged(model, before)
    assert float(model.base_model.model.up.scaling["default"]) == scaling
    same(output(model), expected)


def test_a_merged_adapter_is_refused(tmp_path):
    saved_second(tmp_path)
    model = train(get_peft_model(mlp(), config()))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")


def test_a_rank_that_is_no_room_is_refused():
    model = train(get_peft_model(mlp(), config()))
    before = output(model)
    with pytest.raises(ValueError, match="up to rank 1"):
        prepare_model_for_compiled_hotswap(model, target_rank=1)
    same(output(model), before)
    grouped = adapted("conv2d-grouped")
    with pytest.raises(ValueError, match="2 groups"):
        prepare_model_for_compiled_hotswap(grouped, target_rank=5)
    torch.nn.utils.prune.l1_unstructured(model.base_model.model.down.lora_B["default"], "weight", 0.5)
    with pytest.raises(ValueError, match="'down' up: its factors are computed"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert model.base_model.model.up.r["default"] == 2


def test_another_kind_of_config_is_refused():
    model = train(get_peft_model(mlp(), config()))
    with pytest.raises(ValueError, match="DoraConfig of the adapter"):
        hotswap.hotswap_adapter_from_state_dict(model, {}, "default", LoraConfig(r=2))


def test_plain_lora_is_pefts_own(tmp_path):
    plain = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["up"]))
    train(plain, seed=3).save_pretrained(tmp_path)
    expected = output(plain)
    model = train(get_peft_model(mlp(), LoraConfig(r=3, target_modules=["up"])))
    prepare_model_for_compiled_hotswap(model, target_rank=3, config=model.peft_config)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    same(output(model), expected)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is False
    assert type(model.peft_config["default"]) is LoraConfig


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(One(torch.nn.Linear(3, 3)))


def test_an_adapter_of_another_name(tmp_path):
    expected = saved_second(tmp_path)
    model = train(get_peft_model(mlp(), config(), adapter_name="other"), "other")
    hotswap_adapter(model, str(tmp_path), "other", torch_device="cpu")
    same(output(model), expected)
    assert isinstance(model.peft_config["other"], DoraConfig)
