"""The tuner against PEFT's `LoraConfig(use_dora=True)`: the same numbers in float64, on real architectures."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from dora_peft import DoraConfig

VOCABULARY = 48


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.relu(self.second(self.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


class ConvNet1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3, bias=False)
        self.second = nn.Conv1d(8, 6, 2)

    def forward(self, x):
        return self.second(torch.relu_(self.first(x))).mean(2)


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.head = nn.Linear(12, 6)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)).mean(1))


def llama():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def gpt2():
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return GPT2LMHeadModel(config)


def opt():
    config = OPTConfig(
        hidden_size=32,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
        dropout=0,
    )
    return OPTForCausalLM(config)


def bart():
    config = BartConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        dropout=0,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


def tokens():
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def language_inputs():
    return {"input_ids": tokens(), "labels": tokens()}


def image_inputs():
    return {"x": torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


def signal_inputs():
    return {"x": torch.randn(2, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


MODELS = {
    "llama": (llama, language_inputs, {"target_modules": "all-linear"}),
    "gpt2": (gpt2, language_inputs, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "opt": (opt, language_inputs, {"target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]}),
    "bart": (bart, language_inputs, {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}),
    "conv2d": (ConvNet, image_inputs, {"target_modules": ["first", "second", "head"]}),
    "conv1d": (ConvNet1d, signal_inputs, {"target_modules": ["first", "second"]}),
    "embedding": (Embedder, lambda: {"ids": tokens()}, {"target_modules": ["embed", "head"]}),
}


def base_model(kind):
    """A model in float64 whose weights, biases included, are all random."""
    torch.manual_seed(0)
    model = MODELS[kind][0]().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pair(kind, base=None, **options):
    """PEFT's model and ours on copies of one base, created from the same seed."""
    base = base_model(kind) if base is None else base
    models = []
    for config in (lambda **kwargs: LoraConfig(use_dora=True, **kwargs), DoraConfig):
        torch.manual_seed(1)
        settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **MODELS[kind][2], **options}
        models.append(get_peft_model(copy.deepcopy(base), config(**settings)))
    return models


def away_from_the_start(models):
    """The same change of every adapter tensor, magnitudes included."""
    for model in models:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _, parameter in sorted(trainable(model).items()):
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64))


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def outputs(model, kind):
    result = model(**MODELS[kind][1]())
    return result.logits if hasattr(result, "logits") else result


def loss_of(model, kind):
    result = model(**MODELS[kind][1]())
    return result.loss if hasattr(result, "loss") else result.square().mean()


def same_tensors(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    assert len(found) > 0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# ---- forward, gradients, training, merging


@pytest.mark.parametrize("kind", MODELS)
def test_forward(kind):
    theirs, ours = pair(kind)
    same_tensors(trainable(ours), trainable(theirs))
    away_from_the_start((theirs, ours))
    expected = outputs(theirs, kind)
    torch.testing.assert_close(outputs(ours, kind), expected)
    assert not torch.allclose(outputs(ours.unload(), kind), expected, rtol=1e-2)


@pytest.mark.parametrize("kind", MODELS)
def test_gradients(kind):
    theirs, ours = pair(kind)
    away_from_the_start((theirs, ours))
    gradients = []
    for model in (theirs, ours):
        loss_of(model, kind).backward()
        gradients.append({name: parameter.grad for name, parameter in trainable(model).items()})
    assert all(grad.abs().max() > 0 for name, grad in gradients[0].items() if ".k_proj." not in name)
    same_tensors(gradients[1], gradients[0])


@pytest.mark.parametrize("kind", MODELS)
def test_ten_optimizer_steps_and_merging(kind):
    models = pair(kind)
    theirs, ours = models
    start = {name: parameter.detach().clone() for name, parameter in trainable(ours).items()}
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0)
        history = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, kind)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in trainable(ours).items())
    # Adam divides by the root of squared gradients, so that rounding counts where these are nearly 0
    same_tensors(trainable(ours), trainable(theirs), rtol=1e-6, atol=1e-7)
    for model in models:
        model.eval()
    expected = outputs(ours, kind)
    torch.testing.assert_close(expected, outputs(theirs, kind), rtol=1e-6, atol=1e-6)
    merged = [model.merge_and_unload() for model in models]
    same_tensors(merged[1].state_dict(), merged[0].state_dict(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(outputs(merged[1], kind), expected)


@pytest.mark.parametrize("kind", ["llama", "conv2d", "embedding"])
def test_several_active_adapters_in_evaluation(kind):
    models = pair(kind)
    for model, config in zip(models, (lambda **k: LoraConfig(use_dora=True, **k), DoraConfig), strict=True):
        torch.manual_seed(3)
        model.add_adapter("second", config(r=2, lora_alpha=3, init_lora_weights=False, **MODELS[kind][2]))
        model.base_model.set_adapter(["default", "second"])
    away_from_the_start(models)
    for model in models:
        model.eval()
    torch.testing.assert_close(outputs(models[1], kind), outputs(models[0], kind))
    for model in models:
        model.merge_adapter()
    same_tensors(
        {n: p for n, p in models[1].state_dict().items() if "base_layer" in n},
        {n: p for n, p in models[0].state_dict().items() if "base_layer" in n},
    )


def test_paper_dropout_is_pefts():
    options = {"lora_dropout": 0.5, "target_modules": ["head"], "init_lora_weights": False}
    results = []
    for config in (LoraConfig(use_dora=True, **options), DoraConfig(dropout_mode="paper", **options)):
        base = base_model("conv2d")
        torch.manual_seed(4)
        model = get_peft_model(base, config)
        away_from_the_start([model])
        torch.manual_seed(5)
        results.append(outputs(model, "conv2d"))
    torch.testing.assert_close(results[1], results[0])


# ---- initialisation


INITIALISATIONS = [
    *((init, False) for init in (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")),
    (True, True),
    ("pissa", True),
    pytest.param("loftq", False, marks=pytest.mark.gpu),  # PEFT's LoftQ computes on CUDA only
]


@pytest.mark.parametrize(("init", "use_rslora"), INITIALISATIONS)
def test_initial_tensors(init, use_rslora):
    if init == "loftq":
        pytest.importorskip("scipy")
    options = {"init_lora_weights": init, "use_rslora": use_rslora}
    if init == "loftq":
        options["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1}
    base = base_model("llama").float()
    theirs, ours = pair("llama", base, **options)
    # the base weights as well: some initialisations move a part of them into the adapter
    same_tensors(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs(ours, "llama"), outputs(theirs, "llama"), rtol=1e-4, atol=1e-5)
    if init not in (False, "loftq"):
        torch.testing.assert_close(outputs(ours, "llama"), outputs(base, "llama"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", ["gpt2", "conv2d", "conv1d", "embedding"])
def test_initial_tensors_of_other_layers(kind, init):
    theirs, ours = pair(kind, init_lora_weights=init)
    same_tensors(ours.state_dict(), theirs.state_dict())


def test_ranks_and_alphas_per_module():
    options = {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"q_proj": 9}}
    theirs, ours = pair("llama", **options)
    same_tensors(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(outputs(ours, "llama"), outputs(theirs, "llama"))


# ---- bitsandbytes


def quantised_llama(folder, bits, nested=False):
    """A tiny Llama loaded by transformers with 4-bit or 8-bit weights, on the CPU."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
        max_position_embeddings=32,
    )
    if not (folder / "config.json").exists():
        LlamaForCausalLM(config).save_pretrained(folder)
    if bits == 4:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=torch.float32,
        )
    else:
        quantisation = BitsAndBytesConfig(load_in_8bit=True)
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, device_map={"": "cpu"}, dtype=torch.float32
    )


QUANTISED = [(4, False), (4, True), (8, False)]


# PEFT up to 0.21.2 calls the old name, which transformers 5.23 renamed
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(("bits", "nested"), QUANTISED)
def test_training_a_quantised_model(bits, nested, tmp_path):
    model = prepare_model_for_kbit_training(
        quantised_llama(tmp_path / "base", bits, nested), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(model, DoraConfig(r=4, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, "llama")
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model).values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(".lora_" in name for name in trainable(model))

    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    loaded = PeftModel.from_pretrained(quantised_llama(tmp_path / "base", bits, nested), tmp_path / "adapter").eval()
    assert isinstance(loaded.peft_config["default"], DoraConfig)
    with torch.no_grad():
        torch.testing.assert_close(outputs(loaded, "llama"), outputs(model, "llama"))


@pytest.mark.parametrize(("bits", "nested"), QUANTISED)
def test_a_quantised_model_equals_its_dequantised_self(bits, nested, tmp_path):
    quantised = quantised_llama(tmp_path / "base", bits, nested)
    dense = quantised_llama(tmp_path / "base", bits, nested).dequantize().float()
    models = []
    for base in (quantised, dense):
        torch.manual_seed(1)
        model = get_peft_model(base, DoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        models.append(model.train())
    same_tensors(trainable(models[0]), trainable(models[1]), rtol=1e-3, atol=1e-3)
    # int8 products quantise their input as well
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if bits == 4 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(outputs(models[0], "llama"), outputs(models[1], "llama"), **tolerance)


@pytest.mark.parametrize(("bits", "nested"), QUANTISED)
def test_merging_a_quantised_model(bits, nested, tmp_path):
    base = quantised_llama(tmp_path / "base", bits, nested)
    model = get_peft_model(base, DoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    before = outputs(model, "llama").detach()
    model.merge_adapter()
    merged = outputs(model, "llama").detach()
    # the merged weights are quantised again
    assert (merged - before).norm() < (0.5 if bits == 4 else 0.1) * before.norm()
    with model.disable_adapter():
        assert (outputs(model, "llama") - before).norm() > (merged - before).norm()
    model.unmerge_adapter()
    assert torch.equal(outputs(model, "llama"), before)
