"""Diffusers' own saving and loading: what our layers save its loaders read, to equal outputs, and the reverse."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dora_peft import DoraConfig, DoraLayer, accelerate_use_dora
from dora_peft.adapters import UnreadableError, convert

diffusers = pytest.importorskip("diffusers", reason="the extra `libraries` has no diffusers")
from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin  # noqa: E402
from diffusers.training_utils import _collate_lora_metadata  # noqa: E402
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft  # noqa: E402

# The libraries' own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # PEFT 0.20 only: it looks for the config of a base model without a name
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume"),
]
FILE = "pytorch_lora_weights.safetensors"
LINEAR = ["to_q", "to_v", "to_out.0"]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()


def transformer():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    ).eval()


@torch.no_grad()
def output(model):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    if isinstance(model, diffusers.UNet2DConditionModel):
        return model(random(1, 4, 8, 8), torch.tensor([3]), encoder_hidden_states=random(1, 5, 8)).sample
    return model(random(1, 4, 8, 8), random(1, 5, 12), random(1, 10), torch.tensor([3])).sample


MODELS = {"UNet": (unet, [*LINEAR, "conv1"]), "transformer": (transformer, [*LINEAR, "ff.net.2"])}
OPTIONS = {
    "plain": {},
    "patterns": {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_q": 5}, "use_rslora": True},
    "own": {"dropout_mode": "paper", "detach_norm": False, "magnitude_only_modules": ["to_k"]},
    "PEFT's key": {"magnitude_key": "peft"},
}
kinds = pytest.mark.parametrize("kind", MODELS)


def adapted(model, config):
    """The model with an adapter that has nothing left of its initial values."""
    before = output(model)
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name and not ("to_k" in name and getattr(config, "magnitude_only_modules", None)):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    assert not torch.allclose(output(model), before, atol=0.01)
    return model


def ours(kind, **options):
    make, targets = MODELS[kind]
    return adapted(make(), DoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": targets, **options}))


def theirs(kind, **options):
    make, targets = MODELS[kind]
    shared = {"r": 2, "lora_alpha": 3, "target_modules": targets, "use_dora": True}
    return adapted(make(), LoraConfig(**shared | options))


def read(model, folder):
    """The adapter of a file that diffusers has written, in our layers."""
    with safe_open(folder / FILE, "pt") as file:
        entries = json.loads(file.metadata()["lora_adapter_metadata"])
    return inject(model, DoraConfig(**entries), load_file(folder / FILE))


def inject(model, config, tensors):
    inject_adapter_in_model(config, model, state_dict=tensors)
    found = set_peft_model_state_dict(model, tensors)
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if "lora_" in key]
    return model.eval()


def layers(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_ours_saves_diffusers_loads(kind, options, tmp_path):
    model, again = ours(kind, **options), MODELS[kind][0]()
    model.save_lora_adapter(tmp_path)
    again.load_lora_adapter(tmp_path, prefix=None, weight_name=FILE)
    assert len(layers(again, LoraLayer)) == len(layers(model, DoraLayer)) > 0
    assert isinstance(next(iter(again.peft_config.values())), LoraConfig)
    close(output(again), output(model))
    with accelerate_use_dora():
        close(output(again), output(model))


@kinds
@pytest.mark.parametrize("make", [ours, theirs])
def test_what_diffusers_saves_is_converted(kind, make, tmp_path):
    model = make(kind)
    model.save_lora_adapter(tmp_path)
    convert(tmp_path / FILE, tmp_path / "there", "lycoris")
    convert(tmp_path / "there", tmp_path / "back", "peft")
    tensors = load_file(tmp_path / "back" / "adapter_model.safetensors")
    entries = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    config = DoraConfig(**{name: entries[name] for name in ("r", "lora_alpha", "target_modules")})
    again = inject(MODELS[kind][0](), config, {k.removeprefix("base_model.model."): t for k, t in tensors.items()})
    close(output(again), output(model))


def test_what_a_pipeline_saves_is_converted_unless_it_is_of_two_models(tmp_path):
    model = ours("transformer", target_modules=LINEAR)
    save_pipeline("transformer", model, tmp_path)
    convert(tmp_path / FILE, tmp_path / "out", "peft")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = get_peft_model_state_dict(model)
    assert {key.removeprefix("base_model.model.") for key in tensors} == wanted.keys()
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "text_encoder.r": 2})}
    save_file(wanted, tmp_path / "two.safetensors", metadata=metadata)
    with pytest.raises(UnreadableError, match=r"more than one model \(text_encoder, transformer\)"):
        convert(tmp_path / "two.safetensors", tmp_path / "two", "peft")


@kinds
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_ours_saves_ours_loads(kind, options, tmp_path):
    model = ours(kind, **options)
    model.save_lora_adapter(tmp_path)
    again = read(MODELS[kind][0](), tmp_path)
    assert again.peft_config["default"] == model.peft_config["default"]
    close(output(again), output(model))


@kinds
def test_what_diffusers_saves_ours_loads_and_saves_again(kind, tmp_path):
    model = theirs(kind)
    model.save_lora_adapter(tmp_path / "theirs")
    mine = read(MODELS[kind][0](), tmp_path / "theirs")
    assert len(layers(mine, DoraLayer)) == len(layers(model, LoraLayer)) > 0
    close(output(mine), output(model))
    mine.save_lora_adapter(tmp_path / "ours")
    again = MODELS[kind][0]()
    again.load_lora_adapter(tmp_path / "ours", prefix=None, weight_name=FILE)
    close(output(again), output(model))
    # what plain PEFT saves of ours is ours again
    again.save_lora_adapter(tmp_path / "again", adapter_name=next(iter(again.peft_config)))
    close(output(read(MODELS[kind][0](), tmp_path / "again")), output(model))


class UNetPipeline(StableDiffusionLoraLoaderMixin, diffusers.DiffusionPipeline):
    def __init__(self, unet, text_encoder):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder)


class TransformerPipeline(SD3LoraLoaderMixin, diffusers.DiffusionPipeline):
    def __init__(self, transformer, text_encoder=None, text_encoder_2=None):
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, text_encoder_2=text_encoder_2)


def text_encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=40, projection_dim=8, eos_token_id=2)).eval()


@torch.no_grad()
def encoded(model):
    return model(torch.arange(6)[None]).last_hidden_state


def trained(model):
    """The tensors as diffusers' training scripts take them."""
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(model))


def save_pipeline(kind, model, folder, encoder=None):
    if kind == "UNet":
        UNetPipeline.save_lora_weights(
            folder,
            unet_lora_layers=trained(model),
            text_encoder_lora_layers=None if encoder is None else trained(encoder),
            **_collate_lora_metadata({"unet": model, "text_encoder": encoder}),
        )
    else:
        TransformerPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(model),
            **_collate_lora_metadata({"transformer": model}),
        )


@kinds
def test_what_ours_saves_load_lora_weights_reads(kind, tmp_path):
    # diffusers reads no file with linear layers in its old spelling beside convolutions
    model, encoder = ours(kind, target_modules=LINEAR), text_encoder()
    torch.manual_seed(3)
    encoder.add_adapter(DoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False))
    save_pipeline(kind, model, tmp_path, encoder)
    again = UNetPipeline(unet(), text_encoder()) if kind == "UNet" else TransformerPipeline(transformer())
    again.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="loaded")
    loaded = again.unet if kind == "UNet" else again.transformer
    assert len(layers(loaded, LoraLayer)) == len(layers(model, DoraLayer)) > 0
    close(output(loaded), output(model))
    if kind == "UNet":
        # PEFT's own spelling of the magnitude's key would be lost by transformers here
        close(encoded(again.text_encoder), encoded(encoder))
        assert not torch.allclose(encoded(encoder), encoded(text_encoder()), atol=0.01)
    again.unload_lora_weights()
    close(output(loaded), output(MODELS[kind][0]()))


@kinds
@pytest.mark.parametrize("make", [ours, theirs])
def test_what_save_lora_weights_writes_ours_reads(kind, make, tmp_path):
    model = make(kind, target_modules=LINEAR)
    save_pipeline(kind, model, tmp_path)
    pipeline, prefix = (UNetPipeline, "unet") if kind == "UNet" else (TransformerPipeline, "transformer")
    tensors, *_, entries = pipeline.lora_state_dict(tmp_path, weight_name=FILE, return_lora_metadata=True)
    tensors = {key.removeprefix(f"{prefix}."): tensor for key, tensor in tensors.items()}
    if kind == "UNet":
        tensors = convert_unet_state_dict_to_peft(tensors)
    again = MODELS[kind][0]()
    inject(again, DoraConfig(**{key.removeprefix(f"{prefix}."): value for key, value in entries.items()}), tensors)
    assert len(layers(again, DoraLayer)) == len(layers(model, (DoraLayer, LoraLayer))) > 0
    close(output(again), output(model))
