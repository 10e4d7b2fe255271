"""Inputs of modules on a text: mean squares, second moments, and what is no text."""

import pytest
import torch
from format_fixtures import llama
from lowrank_fixtures import adapted, updates_of
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from dora_peft.adapters.export.calibration import (
    LEAST_TOKENS,
    SecondMoments,
    batched,
    encode,
    mean_squares,
    read_texts,
    tokenizer_of,
)
from dora_peft.adapters.export.lora import export_lora
from dora_peft.adapters.formats import UnreadableError

LAYER = "model.layers.1"
PATHS = [f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj", f"{LAYER}.mlp.down_proj", "lm_head"]


def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 32, (1, length), generator=generator) for length in (30, 50, 70)]


def inputs_of(model, path, ids):
    """What a module was called with, by a hook of the test's own."""
    seen = []
    hook = model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    with torch.no_grad():
        for one in ids:
            model(one)
    hook.remove()
    return torch.cat([x.flatten(0, -2) for x in seen]).double()


class Words:
    """A tokenizer that has seen 30 words."""

    def __call__(self, text):
        return {"input_ids": [1, *(sum(map(ord, word)) % 30 for word in text.split())]}


def test_mean_squares_are_those_of_the_adapted_models_inputs():
    model = adapted()
    found = mean_squares(model, PATHS, batches())
    for path in PATHS:
        expected = inputs_of(model.get_base_model(), path, batches()).square().mean(0)
        assert torch.allclose(found[path], expected, rtol=1e-5)
    assert found[PATHS[0]].dtype == torch.float64
    # of the model with the adapter, which changes them
    bare = mean_squares(llama(), PATHS, batches())
    assert not torch.allclose(bare["lm_head"], found["lm_head"], rtol=1e-4)


def test_second_moments_have_the_mean_squares_as_their_diagonal():
    model = adapted()
    moments, squares = SecondMoments(model, PATHS, batches()), mean_squares(model, PATHS, batches())
    for path in PATHS:
        x = inputs_of(model.get_base_model(), path, batches())
        found = moments(path)
        assert torch.allclose(found.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        assert torch.allclose(found.diagonal().double(), squares[path], rtol=1e-4)
    assert moments("model.norm") is None


@pytest.mark.parametrize(("memory", "passes"), [(2**30, 1), (1, 4), (2 * 4 * 24**2, 3)])
def test_as_many_are_made_in_a_pass_as_fit_into_memory(memory, passes):
    model = adapted()
    moments = SecondMoments(model, PATHS, batches(), memory=memory)
    for path in PATHS:
        assert moments(path).shape[0] == (40 if "down" in path else 24)
        # held no longer than they are used
        assert sum(4 * one.numel() for one in moments._known.values()) <= memory
    assert moments.passes == passes


def test_second_moments_may_be_asked_for_in_any_order_and_again():
    model = adapted()
    moments = SecondMoments(model, PATHS, batches())
    first = moments(PATHS[2])
    assert torch.equal(moments(PATHS[0]), SecondMoments(model, PATHS, batches())(PATHS[0]))
    assert torch.equal(moments(PATHS[2]), first)


def test_an_embeddings_are_the_frequencies_of_tokens():
    path = "model.embed_tokens"
    model = adapted(target_modules=["embed_tokens"])
    ids = torch.cat(batches(), 1)
    counts = torch.bincount(ids.flatten(), minlength=32).double()
    found = mean_squares(model, [path], batches())[path]
    assert torch.allclose(found, (counts + 1) / (ids.numel() + 32))
    assert torch.allclose(SecondMoments(model, [path], batches())(path), found)


def test_conv1d_of_gpt2_has_its_inputs_too():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=32, n_positions=80)).eval()
    path = "transformer.h.0.mlp.c_proj"
    expected = inputs_of(model, path, batches()).square().mean(0)
    assert torch.allclose(mean_squares(model, [path], batches())[path], expected, rtol=1e-5)
    assert mean_squares(model, [path], [])[path].shape == (96,)


class Unused(nn.Module):
    """A model with a module that no token reaches, as an expert may be."""

    def __init__(self):
        super().__init__()
        self.lm, self.expert, self.conv = llama(), nn.Linear(5, 3), nn.Conv2d(1, 1, 1)

    def forward(self, input_ids, use_cache):
        return self.lm(input_ids, use_cache=use_cache)


def test_a_module_that_no_token_reaches_gets_zeros_and_a_convolution_is_refused():
    model = Unused()
    assert not mean_squares(model, ["expert"], batches())["expert"].any()
    assert not SecondMoments(model, ["expert"], batches())("expert").any()
    with pytest.raises(UnreadableError, match="'conv' is a convolution"):
        mean_squares(model, ["conv"], batches())
    with pytest.raises(UnreadableError, match="no module 'other'"):
        mean_squares(model, ["other"], batches())


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_no_hook_stays_and_the_mode_is_as_it_was():
    model = adapted().train()
    before = hooks(model)
    mean_squares(model, PATHS, batches())
    SecondMoments(model, PATHS, batches())(PATHS[0])
    assert model.training
    assert hooks(model) == before
    with pytest.raises(UnreadableError, match="ids up to 99, and the model has fewer"):
        mean_squares(model, PATHS, [torch.tensor([[1, 99]])])
    assert hooks(model) == before


def test_a_fit_by_them_changes_outputs_less(tmp_path):
    model = adapted()
    changes, ids = updates_of(model), torch.cat(batches(), 1)

    def off(weights):
        name = str(len(list(tmp_path.iterdir())))
        result = export_lora(changes, tmp_path / name, base_name="x", rank=1, weights=weights, dtype=torch.float32)
        total = 0.0
        for change in changes:
            own = result.factors[change.path]
            x = inputs_of(model.get_base_model(), change.path, [ids])
            total += float((x @ (change.dense() - own.lora_B.double() @ own.lora_A.double()).T).square().sum())
        return total

    squares = mean_squares(model, [change.path for change in changes], batches())
    moments = SecondMoments(model, [change.path for change in changes], batches())
    # the second moments are all that the outputs depend on
    assert off(moments) < off(squares.get) < off(None)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("one line\nanother\n\n", ["one line", "another"]),
        ("a b\nc\n\nd\n \ne\n", ["a b\nc", "d", "e"]),
        ("alone", ["alone"]),
        ("\ufeffwith a mark", ["with a mark"]),
    ],
)
def test_texts_are_parts_between_blank_lines_or_lines(tmp_path, content, texts):
    (tmp_path / "t.txt").write_text(content, encoding="utf-8")
    assert read_texts(str(tmp_path / "t.txt")) == texts


def test_long_texts_are_cut_into_windows_and_all_tokens_are_kept():
    text = " ".join(str(number) for number in range(500))
    found = encode([text, "x", "a b c"], Words(), window=100)
    whole = [token for one in (text, "x", "a b c") for token in Words()(one)["input_ids"]]
    # the 501st alone has no next token
    assert torch.cat(found, 1)[0].tolist() == whole[:500] + whole[501:]
    assert {ids.shape[0] for ids in found} == {1}
    assert max(ids.shape[1] for ids in found) == 100
    assert sum(ids.numel() for ids in encode([text, text], Words(), most=230)) == 230


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"\xff\xfe\x00", "UTF-8"), (b" \n\n ", "is empty"), (b"", "is empty")],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UnreadableError, match=words) as error:
        read_texts(str(tmp_path / "t.txt"))
    assert "\n" not in str(error.value)


def test_a_folder_and_too_little_text_are_refused(tmp_path):
    with pytest.raises(UnreadableError, match="expected a text file"):
        read_texts(str(tmp_path))
    with pytest.raises(UnreadableError, match=f"has 3 tokens: expected at least {LEAST_TOKENS}"):
        encode(["a b"], Words())


def test_a_base_without_tokenizer_is_refused_in_one_line(tmp_path):
    llama().config.save_pretrained(tmp_path)
    with pytest.raises(UnreadableError, match="--calibration needs the tokenizer of") as error:
        tokenizer_of(str(tmp_path))
    assert "\n" not in str(error.value)


def test_sequences_of_one_length_are_one_batch():
    sequences = [torch.full((1, length), number) for number, length in enumerate((3, 5, 3, 3, 2))]
    found = batched(sequences, most=6)
    assert [tuple(ids.shape) for ids in found] == [(2, 3), (1, 3), (1, 5), (1, 2)]
    assert sorted(row[0].item() for ids in found for row in ids) == [0, 1, 2, 3, 4]
    assert [tuple(ids.shape) for ids in batched(sequences, most=1)] == [(1, 3)] * 3 + [(1, 5), (1, 2)]
