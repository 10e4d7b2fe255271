"""The route `lora`: from a DoRA to the nearest plain LoRA of one rank, with the loss stated."""

import json
import math

import pytest
import torch
from format_fixtures import llama
from lowrank_fixtures import adapted, update, updates_of
from peft import PeftModel
from safetensors.torch import load_file

from dora_peft.adapters.export.lora import export_lora
from dora_peft.adapters.export.plain import RANKS
from dora_peft.adapters.formats import UnreadableError

IDS = torch.arange(10)[None]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return adapted()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def several():
    return [update(40, 33, path="a", seed=1), update(20, 60, path="b", seed=2), update(9, 9, path="c", seed=3)]


def dense_error(result, changes, tensors=None):
    """||dW - B A||_F / ||dW||_F over all, from the factors."""
    rest = update = 0.0
    for change in changes:
        own = result.factors[change.path]
        rest += float((change.dense() - own.lora_B.double() @ own.lora_A.double()).square().sum())
        update += float(change.dense().square().sum())
    return math.sqrt(rest / update)


def test_at_full_rank_peft_computes_what_the_dora_does(model, tmp_path):
    changes = updates_of(model)
    result = export_lora(changes, tmp_path / "lora", base_name="base", rank=32, dtype=torch.float32)
    exported = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    change = (logits(model) - logits(llama().eval())).abs().max()
    assert (logits(exported) - logits(model)).abs().max() < 1e-4 * change
    assert result.error < 1e-5
    assert {module.path for module in result.modules} == {change.path for change in changes}


@pytest.mark.parametrize("rank", [1, 8])
def test_less_rank_leaves_more(model, tmp_path, rank):
    result = export_lora(updates_of(model), tmp_path / "lora", base_name="base", rank=rank)
    error = (logits(PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()) - logits(model)).norm()
    change = (logits(model) - logits(llama().eval())).norm()
    # outputs are off by about as much of their change as weights are
    assert 0.2 * result.error < error / change < 4 * result.error
    assert result.error > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_report_is_of_what_was_written(tmp_path, dtype):
    changes = several()
    result = export_lora(changes, tmp_path / "lora", base_name="base", rank=16, dtype=dtype)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    rest = total = scales = 0.0
    for change, module in zip(changes, result.modules, strict=True):
        A, B = (tensors[f"base_model.model.{change.path}.lora_{name}.weight"].double() for name in "AB")
        assert len(A) == B.shape[1] == 16
        squared = float((change.dense() - B @ A).square().sum())
        size = float(change.dense().norm())
        scale = float(((change.c.double() - 1)[:, None] * change.weight).norm())
        assert module.update == pytest.approx(size, rel=1e-5)
        assert module.error == pytest.approx(math.sqrt(squared) / size, rel=1e-3, abs=1e-6)
        assert module.scale_share == pytest.approx(scale / size, rel=1e-4)
        assert module.rank == min(16, change.out_features)
        rest, total, scales = rest + squared, total + size**2, scales + scale**2
    assert result.error == pytest.approx(math.sqrt(rest / total), rel=1e-3)
    assert result.update == pytest.approx(math.sqrt(total), rel=1e-5)
    assert result.scale_share == pytest.approx(math.sqrt(scales / total), rel=1e-4)
    assert result.error == pytest.approx(dense_error(result, changes), rel=1e-3)


@pytest.mark.parametrize("error", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_rank_is_the_smallest_that_reaches_the_error(tmp_path, error, weighted):
    changes = several()
    weights = {one.path: torch.logspace(0, 3, one.in_features) for one in changes}.get if weighted else None
    result = export_lora(
        changes, tmp_path / "lora", base_name="base", error=error, dtype=torch.float32, weights=weights
    )
    assert result.error == pytest.approx(dense_error(result, changes), rel=1e-3)
    assert result.error <= error
    assert list(result.errors) == list(RANKS)
    assert all(reached > error for rank, reached in result.errors.items() if rank < result.rank)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == result.rank > 1
    assert (result.weighted_error is not None) == weighted


def test_an_error_below_the_rounding_of_the_dtype_is_unreachable(tmp_path):
    with pytest.raises(
        UnreadableError, match=r"--error 1e-05 cannot be reached: at rank 512.*error / update is"
    ) as said:
        export_lora(several(), tmp_path / "lora", base_name="base", error=1e-5, dtype=torch.bfloat16)
    assert 1e-5 < float(str(said.value).split("update is ")[1].split(". ")[0]) < 1e-2
    assert not (tmp_path / "lora").exists()


def test_weights_lower_the_error_that_they_weigh(tmp_path):
    changes = several()
    weights = {one.path: torch.logspace(-2, 2, one.in_features) for one in changes}
    plain = export_lora(changes, tmp_path / "plain", base_name="base", rank=1)
    fitted = export_lora(changes, tmp_path / "fitted", base_name="base", rank=1, weights=weights.get)

    def weighed(result, change):
        own = result.factors[change.path]
        rest = change.dense() - own.lora_B.double() @ own.lora_A.double()
        return float((rest.square() @ weights[change.path].double()).sum())

    for change, module in zip(changes, fitted.modules, strict=True):
        assert weighed(fitted, change) < weighed(plain, change)
        size = float((change.dense().square() @ weights[change.path].double()).sum())
        assert module.weighted_error == pytest.approx(math.sqrt(weighed(fitted, change) / size), rel=1e-2)
    assert fitted.error > plain.error
    assert plain.weighted_error is None


def test_modules_without_weights_are_fitted_without(tmp_path):
    changes = several()
    result = export_lora(
        changes, tmp_path / "lora", base_name="base", rank=1, weights={"a": torch.ones(33)}.get
    )  # fmt: skip
    assert [module.weighted_error is None for module in result.modules] == [False, True, True]


def test_a_module_that_is_unchanged_gets_zeros(tmp_path):
    still = update(6, 5, path="a", scale=0.0)
    still.lora_B.zero_()
    result = export_lora([still], tmp_path / "lora", base_name="base", error=0.1)
    assert (result.rank, result.error, result.modules[0].rank) == (1, 0.0, 0)
    assert not any(bool(t.any()) for t in load_file(tmp_path / "lora" / "adapter_model.safetensors").values())


def test_an_unchanged_magnitude_leaves_the_rank_of_the_factors(tmp_path):
    result = export_lora([update(50, 40, scale=0.0)], tmp_path / "lora", base_name="base", rank=32, dtype=torch.float32)
    assert (result.modules[0].rank, result.rank) == (4, 32)
    assert result.error < 1e-6
    assert result.scale_share < 1e-5


def test_embeddings_are_written_as_peft_reads_them(tmp_path):
    options = {"target_modules": ["embed_tokens", "q_proj"]}
    model = adapted(**options)
    changes = updates_of(model)
    assert any(change.embedding for change in changes)
    export_lora(changes, tmp_path / "lora", base_name="base", rank=32, dtype=torch.float32)
    exported = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    change = (logits(model) - logits(llama().eval())).abs().max()
    assert (logits(exported) - logits(model)).abs().max() < 1e-4 * change


def test_a_convolutions_factors_are_in_its_layout(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, (2, 3), padding=1))
    change = update(5, 18, path="0", kernel=(3, 2, 3))
    export_lora([change], tmp_path / "lora", base_name="base", rank=8, dtype=torch.float32)
    image = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        before = net(image)
        after = PeftModel.from_pretrained(net, tmp_path / "lora")(image)
    expected = torch.nn.functional.conv2d(image, change.dense().float().view(5, 3, 2, 3), padding=1)
    assert torch.allclose(after - before, expected, atol=1e-5)


def test_each_module_is_read_before_the_next_is_asked_for(tmp_path):
    at_hand, seen = [], []

    def one_by_one():
        for change in several():
            at_hand[:] = [change]
            yield change
            change.weight.fill_(torch.nan)

    result = export_lora(one_by_one(), tmp_path / "lora", base_name="base", error=0.3, progress=seen.append)
    assert seen == ["a", "b", "c"]
    assert result.error <= 0.3


def test_a_failure_leaves_nothing(tmp_path):
    changes = several()
    changes[1].c[0] = torch.inf
    with pytest.raises(UnreadableError, match="'b'"):
        export_lora(changes, tmp_path / "lora", base_name="base", rank=1)
    assert not list(tmp_path.iterdir())


def untouched():
    pytest.fail("it was computed before it was refused")
    yield


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--rank or --error"),
        ({"rank": 8, "error": 0.1}, "--rank or --error"),
        ({"rank": 24}, "choose 32"),
        ({"error": 0.0}, "between 0 and 1"),
        ({"error": 1.0}, "between 0 and 1"),
        ({"error": math.nan}, "between 0 and 1"),
        ({"rank": 8, "to": "onnx"}, "one of peft, gguf"),
        ({"rank": 8, "to": "gguf"}, "config.json"),
        ({"rank": 8, "to": "gguf", "config": {"model_type": "bert"}}, "model_type is 'bert'"),
        ({"rank": 8, "to": "gguf", "config": {"model_type": "llama"}}, "ends in .gguf"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        export_lora(untouched(), tmp_path / "lora", base_name="base", **options)


def test_a_folder_that_is_there_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="--force"):
        export_lora(untouched(), tmp_path, base_name="base", rank=8)
    assert export_lora(several(), tmp_path, base_name="base", rank=8, force=True).files


def test_nothing_to_write_is_said(tmp_path):
    with pytest.raises(UnreadableError, match="changes no module"):
        export_lora([], tmp_path / "lora", base_name="base", rank=8)
