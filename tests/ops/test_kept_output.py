"""A kept output is used only if its content is what the layer wrote, whoever writes over it and by whatever means."""

import random
import warnings

import pytest
import torch
from covering import pairs
from kept_output_fixtures import CONSUMERS, SURROUNDINGS, InBackward, InForward, assert_equal, behind, gradients
from layer_fixtures import KINDS, adapted, dora, example, found_gradients, seeded
from linear_fixtures import by_kernels
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import dora_peft
from dora_peft import DoraConfig
from dora_peft.ops import overwritten
from dora_peft.ops.kept_output import KeptOutput
from dora_peft.ops.overwritten import Outputs, Report

pytestmark = pytest.mark.filterwarnings("ignore:Other code overwrites")


class SkippingFirstTokens(InForward):
    """RoPE leaves the first token of each sequence as it is."""

    @staticmethod
    def forward(ctx, y):
        behind(y)[:, 1:] *= 2
        first = torch.ones(y.shape[1]).index_fill_(0, torch.arange(1, y.shape[1]), 2.0)
        ctx.factor = first.view(-1, *[1] * (y.dim() - 2))
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.factor * g


class SomeColumns(InForward):
    """Partial rotary embeddings change some columns of all tokens."""

    @staticmethod
    def forward(ctx, y):
        behind(y)[..., -1:] *= 2
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.cat([g[..., :-1], 2 * g[..., -1:]], -1)


WITH_INPUT_GRADIENT = [kind for kind in KINDS if "embedding" not in kind]


@pytest.mark.cached_norms
@pytest.mark.parametrize(
    ("kind", "consumer", "surroundings", "magnitude_only"),
    pairs(WITH_INPUT_GRADIENT, CONSUMERS, SURROUNDINGS, [False, True]),
)
def test_a_raw_write_changes_no_gradient(kind, consumer, surroundings, magnitude_only):
    """Not in the first backward pass, and not in later ones, whatever the layer does from then on."""
    options = {"magnitude_only_modules": ["layer"]} if magnitude_only else {}
    model = adapted(kind, **options)
    x, (unseen, plain), apply = example(model), CONSUMERS[consumer], SURROUNDINGS[surroundings]
    expected = gradients(model, x, plain, apply)
    for action in (None, "recompute", "copy"):
        with dora_peft.on_overwritten_output(action or "recompute"):
            assert_equal(gradients(model, x, unseen, apply), expected)
    # a checkpoint stops its second forward pass when it has what it needs, before this consumer
    assert dora(model)._outputs.overwritten == ((consumer, surroundings) != ("forward", "checkpoint"))
    assert_equal(gradients(model, x, plain, apply), expected)


@pytest.mark.cached_norms
@pytest.mark.parametrize(("kind", "layout"), [("conv2d", torch.channels_last), ("conv3d", torch.channels_last_3d)])
def test_layouts_of_images(kind, layout):
    """Kept as they lie in memory, believed while they are untouched, and computed again if they are not."""
    model = adapted(kind).to(memory_format=layout) if kind == "conv2d" else adapted(kind)
    x = example(model).detach().to(memory_format=layout).requires_grad_()
    assert not model(x).is_contiguous()
    expected = gradients(model, x, torch.sigmoid, SURROUNDINGS["plain"])
    assert not dora(model)._outputs.overwritten
    twice = gradients(model, x, lambda y: 2 * y, SURROUNDINGS["plain"])
    assert_equal(gradients(model, x, InForward.apply, SURROUNDINGS["plain"]), twice)
    assert dora(model)._outputs.overwritten
    assert_equal(gradients(model, x, torch.sigmoid, SURROUNDINGS["plain"]), expected)


@pytest.mark.cached_norms
@pytest.mark.parametrize("consumer", [SkippingFirstTokens, SomeColumns])
@pytest.mark.parametrize("length", [2, 5, 300])
def test_a_part_that_is_written_is_seen(consumer, length):
    # Where the sample lies is drawn before the kernels compare it, and interpreting them takes seconds.
    for seed in range(4 if by_kernels(torch.float32) else 20):
        model = adapted("linear")
        x = torch.randn(2, length, 12, generator=seeded(seed))
        first = torch.ones(length, 1).index_fill_(0, torch.arange(1, length), 2.0)
        last = torch.tensor([1.0] * 9 + [2.0])
        factor = first if consumer is SkippingFirstTokens else last
        expected = gradients(model, x, lambda y, f=factor: y * f, SURROUNDINGS["plain"])
        assert_equal(gradients(model, x, consumer.apply, SURROUNDINGS["plain"]), expected)


@pytest.mark.parametrize("what", ["every other token", "all tokens but the rows", "a column of the rows"])
def test_a_part_of_a_large_output_that_is_written_is_seen(what):
    """Whole rows and a diagonal each see what the other does not."""
    for _ in range(20):
        y, outputs = torch.randn(700, 900), Outputs("one")
        kept = KeptOutput(y, outputs)
        saved = kept.saved
        assert sum(part.numel() for part in saved) < 4 * 900 + 701
        rows = slice(kept.places[0], kept.places[0] + 4)
        if what == "every other token":
            behind(y)[::2] = 3
        # the diagonal alone sees it
        elif what == "all tokens but the rows":
            before = y[rows].clone()
            behind(y)[...] = 3
            behind(y)[rows] = before.numpy()
        else:
            # the rows alone do, but where the diagonal crosses that column
            behind(y)[rows, 7] = 3
        assert kept.read(saved, torch.ones(())) == (None, None)
        assert outputs.overwritten


def test_a_gradient_that_is_the_output_itself_is_no_write():
    """As of a loss y^2 / 2 whose function returns y: not used, since it may be written to, and not warned of."""
    model = adapted("linear")
    x = example(model)
    y = model(x)
    expected = found_gradients(model, x, model(x), y.detach().clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = found_gradients(model, x, y, y.detach())
    assert_equal(found, expected)
    assert not dora(model)._outputs.overwritten


def test_what_a_forward_pass_learns_is_said_by_the_next_backward_pass():
    """With the names of all modules, which each learn by themselves."""
    report = Report()
    layers = [Outputs(f"layer{i}", report) for i in range(3)]
    leaf = torch.ones(2, requires_grad=True)

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = KeptOutput(x * 2, layers[0])
            ctx.parts = ctx.kept.saved
            return x * 2

        @staticmethod
        def backward(ctx, g):
            ctx.kept.read(ctx.parts, g)
            return 2 * g

    for outputs in layers:
        outputs.notice_later(torch.ones(1, dtype=torch.int32))
    for outputs in layers:
        outputs.learn()
    with pytest.warns(UserWarning, match="layer0, layer1, layer2"):
        Reads.apply(leaf).sum().backward()


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 7), (3, 2, 5), (40, 3000), (5000, 3), (2049, 700)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hooks", [False, True])
def test_an_untouched_output_is_kept(hooks, dtype, shape):
    y, outputs = torch.randn(shape).to(dtype), Outputs("one")
    for _ in range(5):
        with saved_tensors_hooks(lambda t: t, lambda t: t) if hooks else warnings.catch_warnings():
            kept = KeptOutput(y, outputs)
        saved = kept.saved
        found, gone = kept.read(saved, torch.ones(()))
        assert gone is None
        assert torch.equal(found, y)
    assert not outputs.overwritten


def test_where_the_sample_is_from_differs_each_time_and_is_no_ones_random_number():
    y = torch.randn(400, 600)
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    places = {KeptOutput(y, Outputs()).places for _ in range(20)}
    assert len(places) > 10
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert random.getstate() == python_before


def signature(model, x):
    packed = []

    def pack(tensor):
        packed.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return packed


@pytest.mark.cached_norms
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d-grouped"])
def test_what_is_saved_does_not_depend_on_what_was_learned(kind):
    model = adapted(kind)
    x, before = example(model), None
    for found in (False, True):
        for action in overwritten.ACTIONS:
            dora(model)._outputs.overwritten = found
            with dora_peft.on_overwritten_output(action):
                found = signature(model, x)
            assert before in (None, found)
            before = found


@pytest.mark.cached_norms
@pytest.mark.parametrize("action", overwritten.ACTIONS)
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_two_checkpointed_graphs_in_flight(consumer, action):
    """The first backward pass learns what the second one's recomputation then knows."""
    unseen, plain = CONSUMERS[consumer]

    def run(apply, model):
        x = example(model)
        outs = [checkpoint(lambda x: apply(model(x)), x * k, use_reentrant=False) for k in (1.0, 2.0)]
        for out in outs:
            out.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with dora_peft.on_overwritten_output(action):
        assert_equal(run(unseen, adapted("linear")), run(plain, adapted("linear")))


@pytest.mark.cached_norms
def test_copies_and_recomputations_are_what_they_cost():
    model, sizes = adapted("linear"), {}
    dora(model)._outputs.overwritten = True
    for action in overwritten.ACTIONS:
        with dora_peft.on_overwritten_output(action):
            kept = model(example(model)).grad_fn.kept
        sizes[action] = kept.alias.untyped_storage().nbytes()
    assert sizes == {"copy": 3 * 5 * 10 * 4, "recompute": 4}


@pytest.mark.cached_norms
def test_offloaded_outputs_are_those_of_the_forward_pass():
    """A copy that a hook made before the write is right, and so are the gradients."""
    model = adapted("linear")
    x = example(model)
    expected = gradients(model, x, lambda y: 2 * y, SURROUNDINGS["plain"])

    def offloaded(function, x):
        with save_on_cpu():
            return function(x)

    assert_equal(gradients(model, x, InForward.apply, offloaded), expected)


def test_one_warning_per_model_names_the_modules():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    get_peft_model(base, DoraConfig(r=2, target_modules=["0", "1", "2"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            x = torch.randn(4, 6)
            for layer in (base[0], base[2]):
                x = InForward.apply(layer(x))
            base[1](x).sum().backward()
    (warning,) = [str(w.message) for w in caught if "overwrites" in str(w.message)]
    assert ": 2, 0." in warning or ": 0, 2." in warning
    assert 'on_overwritten_output("copy")' in warning
    assert "one product with the base weight" in warning


@pytest.mark.cached_norms
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_torchs_own_operations_in_place_need_no_warning(kind):
    """Their version counter shows each write, so that nothing has to be remembered of them."""
    model = adapted(kind)
    x = example(model)
    expected = gradients(model, x, torch.sigmoid, SURROUNDINGS["plain"])
    for action in overwritten.ACTIONS:
        with dora_peft.on_overwritten_output(action):
            assert_equal(gradients(model, x, torch.sigmoid_, SURROUNDINGS["plain"]), expected)
            assert not dora(model)._outputs.overwritten


@pytest.mark.cached_norms
def test_layers_that_peft_built():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    x = torch.randn(4, 6, requires_grad=True)
    expected = gradients(model, x, lambda y: y * y, SURROUNDINGS["plain"])
    with dora_peft.accelerate_use_dora():
        for _ in range(2):
            assert_equal(gradients(model, x, InBackward.apply, SURROUNDINGS["plain"]), expected)


def test_unknown_actions_are_refused():
    with pytest.raises(ValueError, match="must be one of recompute, copy, found 'ignore'"):
        dora_peft.on_overwritten_output("ignore")
    with dora_peft.on_overwritten_output("copy"):
        assert overwritten.chosen == "copy"
    assert overwritten.chosen == "recompute"
