"""A swap gives what a fresh load of the same folder gives, or is refused and changes nothing."""

import pytest
import torch
from model_fixtures import config, differs, llama, output, train, unchanged
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from dora_peft.adapters.swappable import check_options, initialisation_of_base, without_base

# PEFT's own
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"),
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'corda' but `corda_config` is not specified"),
]
TARGETS = ["q_proj", "down_proj"]
BESIDE = {
    "whole module": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
}


def base(**options):
    """In fp32, as PiSSA and OLoRA need, with biases that are not zero."""
    model = llama(attention_bias=True, **options).float()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=generator)
    return model


def trained(seed, make=base, **options):
    """A model with an adapter all of whose tensors have moved, and what it trains beside them too."""
    model = get_peft_model(make(), config(**({"target_modules": TARGETS} | options)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return train(model, seed=seed)


def saved(folder, make=base, **options):
    trained(5, make, **options).save_pretrained(folder)
    return output(PeftModel.from_pretrained(make(), folder).eval())


def refused(model, folder, message):
    # first, as magnitudes of zero rows follow in a forward pass
    expected = output(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(folder), "default", torch_device="cpu")
    assert unchanged(model, before)
    assert torch.equal(output(model), expected)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("through", ["PEFT's function", "the tuner's method"])
@pytest.mark.parametrize("options", BESIDE.values(), ids=BESIDE)
def test_what_is_trained_beside_goes_along(options, through, tmp_path):
    expected = saved(tmp_path / "new", **options, r=1)
    model = trained(1, **options)
    differs(output(model), expected)
    if through == "PEFT's function":
        hotswap_adapter(model, str(tmp_path / "new"), "default", torch_device="cpu")
    else:
        model.hotswap_adapter(str(tmp_path / "new"))
    close(output(model), expected)
    model.save_pretrained(tmp_path / "again")
    close(output(PeftModel.from_pretrained(base(), tmp_path / "again").eval()), expected)


@pytest.mark.parametrize("old", [True, False], ids=["the old one", "the new one"])
@pytest.mark.parametrize("options", BESIDE.values(), ids=BESIDE)
def test_what_only_one_of_them_trains_is_refused(options, old, tmp_path):
    saved(tmp_path, **({} if old else options))
    refused(trained(1, **(options if old else {})), tmp_path, "lm_head|trainable_token_indices|bias is")


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_the_bases_embedding_in_the_folder(module, tied, tmp_path):
    """PEFT saves it with an adapter on it."""
    targets = {"target_modules": ["q_proj", module]}

    def make(scale=1.0):
        model = base(tie_word_embeddings=tied)
        model.get_input_embeddings().weight.data.mul_(scale)
        model.lm_head.weight.data.mul_(1.0 if tied else scale)
        return model

    expected = saved(tmp_path / "new", make, **targets, r=1)
    model = trained(1, make, **targets)
    hotswap_adapter(model, str(tmp_path / "new"), "default", torch_device="cpu")
    close(output(model), expected)
    refused(trained(1, lambda: make(2.0), **targets), tmp_path / "new", f"holds the base model's '.*{module}.*'")


def test_the_bases_embedding_is_compared_without_what_is_merged_into_it(tmp_path):
    targets = {"target_modules": ["q_proj", "embed_tokens"]}
    saved(tmp_path, **targets)
    model = trained(1, **targets)
    model.add_adapter("other", config(**targets, init_lora_weights=False))
    model.merge_adapter(["other"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert without_base(model, {key: base().model.embed_tokens.weight}, "default", "it") == {}
    with pytest.raises(ValueError, match="holds the base model's"):
        without_base(model, {key: model.base_model.model.model.embed_tokens.base_layer.weight}, "default", "it")


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    ("old", "new"), [(True, False), (False, True), (True, {"r": 1}), (True, {"lora_alpha": 7})], ids=str
)
def test_initialisations_that_changed_the_base_otherwise(init, old, new, tmp_path):
    changing = {"init_lora_weights": init}
    saved(tmp_path, **({**changing, **new} if isinstance(new, dict) else changing if new else {}))
    refused(trained(1, **(changing if old else {})), tmp_path, f"init_lora_weights='{init}' changed the base's weights")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_changed_the_base_in_the_same_way(init, tmp_path):
    expected = saved(tmp_path, init_lora_weights=init)
    model = trained(1, init_lora_weights=init)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    close(output(model), expected)


def test_initialisations_from_data_are_refused_however_equal():
    one = config(init_lora_weights="corda")
    with pytest.raises(ValueError, match="init_lora_weights='corda' changed the base's weights"):
        check_options(one, config(init_lora_weights="corda"), "default", "it")
    assert initialisation_of_base(one) == "corda"
    assert initialisation_of_base(config(init_lora_weights="orthogonal")) is None


def test_room_for_larger_ranks_where_the_base_was_changed():
    """Saved, the adapter would say a rank at which loading takes another part out of W0."""
    model = trained(1, init_lora_weights="pissa")
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, output(model)
    with pytest.raises(ValueError, match="'default' up to rank 5: init_lora_weights='pissa'"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    assert unchanged(model, before)
    prepare_model_for_compiled_hotswap(model, target_rank=2)
    close(output(model), expected)
