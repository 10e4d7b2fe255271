"""Whatever ends an operation half-way, Ctrl-C included, leaves the model as it was; the operation then succeeds."""

import inspect

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM

from dora_peft import DoraConfig, DoraLayer, DoraModel
from dora_peft.adapters import checkpoint, combine
from dora_peft.bases import Dense

IDS = torch.arange(12).view(2, 6)


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(**sizes, **heads, **tokens, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def config(**options):
    shared = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return DoraConfig(**shared | options)


def adapted(**options):
    torch.manual_seed(1)
    return get_peft_model(base(), config(**options)).eval()


def two_adapters(**options):
    model = adapted(**options)
    model.add_adapter("second", config(r=3))
    return model.eval()


def with_transformers():
    torch.manual_seed(1)
    model = base()
    model.add_adapter(config())
    model.add_adapter(config(r=3), "second")
    model.set_adapter("default")
    return model.eval()


def merged():
    model = adapted()
    model.merge_adapter()
    return model


def merged_first():
    model = two_adapters()
    model.merge_adapter(["default"])
    return model


def save(folder, **options):
    torch.manual_seed(7)
    get_peft_model(base(), config(**options)).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def state(model):
    """All that an operation could have changed, as copies."""
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "active_adapters") and hasattr(m, "merged_adapters")}
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "tensors": {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "configs": {name: dict(vars(c)) for name, c in getattr(model, "peft_config", {}).items()},
        "has configs": hasattr(model, "peft_config"),
        "loaded": getattr(model, "_hf_peft_config_loaded", None),
        "active": {name: list(layer.active_adapters) for name, layer in layers.items()},
        "active in the model": getattr(model, "active_adapter", None) if isinstance(model, PeftModel) else None,
        "merged": {name: list(layer.merged_adapters) for name, layer in layers.items()},
        "scalings": {name: dict(layer.scaling) for name, layer in layers.items() if hasattr(layer, "scaling")},
        "options": {name: dict(layer.detach_norm) for name, layer in layers.items() if hasattr(layer, "detach_norm")},
        "output": model(IDS).logits,
    }


def unchanged(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "tensors":
            assert found[name].keys() == value.keys()
            assert [k for k, tensor in value.items() if not torch.equal(found[name][k], tensor)] == []
        elif name == "output":
            assert torch.equal(found[name], value)
        else:
            assert found[name] == value, name


# By name: how to make the model, the operation, and where it is stopped, at the second call.
OPERATIONS = {
    "get_peft_model": (base, lambda m, _: get_peft_model(m, config()), (DoraLayer, "update_layer")),
    "get_peft_model, PiSSA": (
        base,
        lambda m, _: get_peft_model(m, config(init_lora_weights="pissa")),
        (DoraLayer, "update_layer"),
    ),
    "get_peft_model, PiSSA in all layers": (
        base,
        lambda m, _: get_peft_model(m, config(init_lora_weights="pissa")),
        (DoraModel, "_cast_adapter_dtype"),
    ),
    "get_peft_model, OLoRA in place": (
        base,
        lambda m, _: get_peft_model(m, config(init_lora_weights="olora")),
        (DoraLayer, "update_layer"),
    ),
    "get_peft_model, replicated layers": (
        base,
        lambda m, _: get_peft_model(m, config(layer_replication=[[0, 2], [1, 2]])),
        (DoraLayer, "update_layer"),
    ),
    "get_peft_model, after all layers": (
        base,
        lambda m, _: get_peft_model(m, config(modules_to_save=["lm_head"])),
        (DoraModel, "_cast_adapter_dtype"),
    ),
    "inject": (base, lambda m, _: inject_adapter_in_model(config(), m), (DoraLayer, "update_layer")),
    "add_adapter": (adapted, lambda m, _: m.add_adapter("second", config()), (DoraLayer, "update_layer")),
    "add_adapter, after all layers": (
        adapted,
        lambda m, _: m.add_adapter("second", config(bias="all", modules_to_save=["lm_head"])),
        (DoraModel, "_cast_adapter_dtype"),
    ),
    "from_pretrained, creating": (base, PeftModel.from_pretrained, (DoraLayer, "update_layer")),
    "from_pretrained, loading": (base, PeftModel.from_pretrained, (checkpoint, "_load_layer")),
    "load_adapter, creating": (adapted, lambda m, f: m.load_adapter(f, "second"), (DoraLayer, "update_layer")),
    "load_adapter, loading": (adapted, lambda m, f: m.load_adapter(f, "second"), (checkpoint, "_load_layer")),
    "load_adapter, over another": (
        lambda: adapted(bias="all", modules_to_save=["lm_head"]),
        lambda m, f: m.load_adapter(f, "default"),
        (DoraModel, "_cast_adapter_dtype"),
    ),
    "hotswap_adapter": (adapted, lambda m, f: m.hotswap_adapter(f), (checkpoint, "_load_layer")),
    "hotswap_adapter, copying": (adapted, lambda m, f: m.hotswap_adapter(f), (torch.nn.Parameter, "copy_")),
    "add_weighted_adapter": (
        two_adapters,
        lambda m, _: m.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum"),
        (combine, "_fill_layer"),
    ),
    "merge_adapter": (adapted, lambda m, _: m.merge_adapter(), (DoraLayer, "merge")),
    "merge_adapter, a second one": (
        merged_first,
        lambda m, _: m.merge_adapter(["second"]),
        (DoraLayer, "merge"),
    ),
    "merge_adapter, off the device": (
        adapted,
        lambda m, _: m.merge_adapter(offload_original=True),
        (Dense, "install"),
    ),
    "unmerge_adapter": (merged, lambda m, _: m.unmerge_adapter(), (DoraLayer, "unmerge")),
    "merge_and_unload, merging": (adapted, lambda m, _: m.merge_and_unload(), (DoraLayer, "merge")),
    "merge_and_unload, unloading": (adapted, lambda m, _: m.merge_and_unload(), (DoraModel, "_replace_module")),
    "unload": (adapted, lambda m, _: m.unload(), (DoraModel, "_replace_module")),
    "set_adapter": (two_adapters, lambda m, _: m.set_adapter("second"), (DoraLayer, "set_adapter")),
    "set_adapter, several": (
        two_adapters,
        lambda m, _: m.base_model.set_adapter(["default", "second"]),
        (DoraLayer, "set_adapter"),
    ),
    "delete_adapter": (two_adapters, lambda m, _: m.delete_adapter("default"), (DoraLayer, "delete_adapter")),
    "save_pretrained": (adapted, lambda m, f: m.save_pretrained(f), (checkpoint, "_readable_by_peft")),
    "save_pretrained, the config": (two_adapters, lambda m, f: m.save_pretrained(f), (DoraConfig, "save_pretrained")),
    "transformers add_adapter": (base, lambda m, _: m.add_adapter(config()), (DoraLayer, "update_layer")),
    "transformers add_adapter, setting": (
        base,
        lambda m, _: m.add_adapter(config()),
        (LlamaForCausalLM, "set_adapter"),
    ),
    "transformers load_adapter, creating": (base, lambda m, f: m.load_adapter(f), (DoraLayer, "update_layer")),
    "transformers load_adapter, loading": (base, lambda m, f: m.load_adapter(f), (checkpoint, "_load_layer")),
    "transformers load_adapter, a second": (
        with_transformers,
        lambda m, f: m.load_adapter(f, "third"),
        (DoraLayer, "update_layer"),
    ),
    "transformers set_adapter": (with_transformers, lambda m, _: m.set_adapter("second"), (DoraLayer, "set_adapter")),
    "transformers delete_adapter": (
        with_transformers,
        lambda m, _: m.delete_adapter("second"),
        (DoraLayer, "delete_adapter"),
    ),
}
ONCE = {"_cast_adapter_dtype"}


def stop(monkeypatch, owner, name, error):
    """Raise `error` at the second call of a function, or at the first of one that is called once."""
    original, calls = getattr(owner, name), []
    last = 1 if name in ONCE or owner is LlamaForCausalLM else 2

    def stopped(*args, **kwargs):
        calls.append(name)
        if len(calls) == last:
            raise error
        return original(*args, **kwargs)

    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    monkeypatch.setattr(owner, name, staticmethod(stopped) if static else stopped)
    return calls


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings(
    "ignore:.*multiple adapters in the model",
    "ignore:Already following adapters were merged",
    "ignore:Adapter default was active which is now deleted",
    "ignore:Could not find a config file in",
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_model_is_as_before_and_the_operation_still_possible(operation, error, tmp_path, monkeypatch):
    make, change, (owner, name) = OPERATIONS[operation]
    options = {"bias": "all", "modules_to_save": ["lm_head"]} if "over another" in operation else {}
    folder = save(tmp_path / "adapter", **options)
    model = make()
    before, on_disk = state(model), files(tmp_path)
    with monkeypatch.context() as patch:
        calls = stop(patch, owner, name, error("stopped"))
        with pytest.raises(error):
            change(model, folder)
    assert calls
    unchanged(state(model), before)
    assert files(tmp_path) == on_disk
    change(model, folder)


@pytest.mark.parametrize("operation", ["merge_adapter", "merge_and_unload"])
def test_a_weight_that_is_not_finite_in_the_last_layer_leaves_all_as_they_were(operation):
    model = adapted()
    layer = [m for m in model.modules() if isinstance(m, DoraLayer)][-1]
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight[0] = torch.inf
    before = state(model)
    before["output"] = None
    with pytest.raises(ValueError, match="NaNs detected"):
        getattr(model, operation)(safe_merge=True)
    found = state(model)
    found["output"] = None
    assert found.pop("output") is before.pop("output")
    unchanged(found, before)


@pytest.mark.parametrize("operation", ["merge_adapter", "merge_and_unload"])
def test_merging_over_weights_that_accelerate_keeps_elsewhere(operation, monkeypatch):
    torch.manual_seed(1)
    model = get_peft_model(cpu_offload(base(), execution_device="cpu"), config()).eval()
    with torch.no_grad():
        before = model(IDS).logits
        with monkeypatch.context() as patch:
            stop(patch, DoraLayer, "merge", KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                getattr(model, operation)()
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, DoraLayer))
        assert torch.equal(model(IDS).logits, before)
        merged = getattr(model, operation)() or model
        torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-3, atol=1e-4)


def test_a_first_copy_of_a_shared_base_weight_counts(monkeypatch):
    """PiSSA over two layers with one weight: the second copy would be of what the first layer has changed."""
    model = base()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    before = first.q_proj.weight.detach().clone()
    with monkeypatch.context() as patch:
        stop(patch, DoraModel, "_cast_adapter_dtype", RuntimeError())
        with pytest.raises(RuntimeError):
            get_peft_model(model, config(target_modules=["q_proj"], init_lora_weights="pissa"))
    assert second.q_proj.weight is first.q_proj.weight
    assert torch.equal(first.q_proj.weight, before)
