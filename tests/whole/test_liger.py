"""Liger Kernel, which rotates q and k in place and writes SwiGLU's gradients over gate and up: gradients stay right.

Its Triton kernels write by raw pointers, so that no version counter moves. Here they run in Triton's interpreter, from
`use_liger_kernel=True` of transformers' Trainer and TRL or as its own documentation applies them.
"""

import copy

import pytest
import torch
from layer_fixtures import distance, seeded
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.models.llama import modeling_llama

from dora_peft import DoraConfig, accelerate_use_dora, implementation
from dora_peft.ops.constants import interpreted

liger = pytest.importorskip("liger_kernel.transformers", reason="the extra `libraries` has no liger-kernel")

pytestmark = [
    # as users run
    pytest.mark.cached_norms,
    # the libraries' own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # A user is told once per model that its outputs are written over.
    pytest.mark.filterwarnings("default::UserWarning"),
    pytest.mark.skipif(not interpreted(), reason="the tensors are on the CPU, for Triton's interpreter"),
]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Batches of two sequences, short because each row of each kernel is interpreted.
SAMPLES = torch.randint(3, 32, (4, 2, 4), generator=seeded(4))
CHECKPOINTING = {"none": None, "non-reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


@pytest.fixture(autouse=True)
def interpreted_liger(monkeypatch):
    """What the kernels need on a CPU; afterwards transformers' LLaMA is as it was."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    # The interpreter hands a float argument on as Python's, where a GPU gets an fp32 scalar, which has a .to().
    convert = interpreter._implicit_cvt

    def as_fp32(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", as_fp32)
    # CUDA's libdevice is not interpreted; looked up at each call, because the interpreter replaces it for a launch.
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: tl.rsqrt(x))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.3, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    return LlamaForCausalLM(config)


def trained(config=DoraConfig, **options):
    """A LLaMA with adapters everywhere of which nothing is at its initial value."""
    model = get_peft_model(llama(), config(r=2, lora_alpha=4, target_modules=TARGETS, **options))
    generator = seeded(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=generator))
            elif "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def model(kind):
    if kind == "DoraConfig":
        yield trained()
    else:
        with accelerate_use_dora():
            yield trained(LoraConfig, use_dora=True)


def exact_gradients(model, batches):
    """By the same weights without Liger, in float64 through the dense reference."""
    with implementation("reference"):
        return gradients(copy.deepcopy(model).double(), batches)


def gradients(model, batches):
    """Of the sum of the batches' losses, all of whose graphs are alive together."""
    model.train()
    losses = [model(input_ids=batch, labels=batch).loss for batch in batches]
    for loss in losses:
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == 3 * len(TARGETS) * 2
    model.zero_grad()
    return found


def assert_equal(found, expected, bound=1e-4):
    wrong = {name: error for name in expected if not (error := distance(found[name], expected[name])) < bound}
    assert not wrong


def with_liger(model, checkpointing=None):
    liger.apply_liger_kernel_to_llama(model=model.get_base_model())
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


# The two tests that follow share the six pairs of adapter and checkpointing, so that each meets every one of both.
@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("DoraConfig", "none"), ("use_dora", "non-reentrant"), ("DoraConfig", "reentrant")]
)
def test_every_gradient_is_right_from_the_first_backward_pass_on(model, checkpointing):
    expected = exact_gradients(model, SAMPLES[:1])
    with_liger(model, CHECKPOINTING[checkpointing])
    calls = []
    model.base_model.model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(None))
    for _ in range(2):
        assert_equal(gradients(model, SAMPLES[:1]), expected)
    assert len(calls) == (2 if checkpointing == "none" else 4)


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("use_dora", "none"), ("DoraConfig", "non-reentrant"), ("use_dora", "reentrant")]
)
def test_what_is_learnt_from_one_graph_does_not_break_another_that_is_alive(model, checkpointing):
    expected = exact_gradients(model, SAMPLES[:2])
    with_liger(model, CHECKPOINTING[checkpointing])
    for _ in range(2):
        assert_equal(gradients(model, SAMPLES[:2]), expected)


@pytest.mark.parametrize("kernel", ["rope", "swiglu", "rms_norm", "fused_linear_cross_entropy"])
def test_each_kernel_alone(kernel):
    model = trained()
    expected = exact_gradients(model, SAMPLES[:1])
    off = dict.fromkeys(["rope", "swiglu", "rms_norm", "fused_linear_cross_entropy"], False)
    liger.apply_liger_kernel_to_llama(**off | {kernel: True}, model=model.get_base_model())
    assert_equal(gradients(model, SAMPLES[:1]), expected)


def test_in_half_precision():
    """Allowed is twice the error of the same kernels in the same precision over layers that keep nothing.

    In fp16, because the interpreter cannot calculate in bf16.
    """
    model = trained().to(torch.float16)
    expected = exact_gradients(model, SAMPLES[:1])
    with_liger(model)
    with implementation("reference"):
        naive = gradients(model, SAMPLES[:1])
    found = gradients(model, SAMPLES[:1])
    errors = {name: (distance(found[name], e), distance(naive[name], e)) for name, e in expected.items()}
    assert not {name: pair for name, pair in errors.items() if not pair[0] <= 2 * pair[1] + 2**-11}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trainer_with_use_liger_kernel(tmp_path, gradient_checkpointing):
    """Plain gradient descent, so that the weights after two steps show the gradients' sizes."""
    rows = SAMPLES.flatten(0, 1)
    data = [{"input_ids": row, "labels": row.clone()} for row in rows]

    def after_two_steps(**options):
        arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.1}
        silent = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 3}
        model = trained()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        args = TrainingArguments(str(tmp_path), **arguments, **silent, dataloader_pin_memory=False, **options)
        Trainer(model, args, train_dataset=data).train()
        return {name: model.get_parameter(name).detach() - value for name, value in before.items()}

    with implementation("reference"):
        expected = after_two_steps()
    found = after_two_steps(use_liger_kernel=True, gradient_checkpointing=gradient_checkpointing)
    assert_equal(found, {name: value.double() for name, value in expected.items()}, bound=1e-3)
