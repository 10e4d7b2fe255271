"""Which tensors of a base are made anew, and what becomes of those that were tied."""

import pytest
import torch
from export_fixtures import qwen
from format_fixtures import saved

from dora_peft.adapters.export.adapted import AdaptedBase
from dora_peft.adapters.export.pieces import check_all, config_of, options_of, pieces_of
from dora_peft.adapters.formats import Checkpoint, UnreadableError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`"
)
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def opened(tmp_path, tied=True, **options):
    qwen(tied).save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", qwen(tied), **options)
    return AdaptedBase(Checkpoint(tmp_path / "base"), [tmp_path / "adapter"])


def made(adapted, dtype=None):
    """Everything that is made anew with adapted weights of ones, and the untied parameters."""

    def ones(path):
        return torch.ones_like(adapted.stored(path), dtype=dtype)

    pieces, untied = pieces_of(adapted, dtype, ones)
    tensors = {}
    for piece in pieces:
        for key, tensor in piece.make().items():
            assert key not in tensors
            tensors[key] = tensor
    for piece in pieces:
        assert sum(tensor.nbytes for tensor in piece.make().values()) <= piece.nbytes
    return tensors, untied


@pytest.mark.parametrize(
    ("targets", "ones"),
    [(["lm_head"], [HEAD]), (["embed_tokens"], [TABLE]), (["lm_head", "embed_tokens"], [HEAD, TABLE])],
)
def test_tied_tables_that_are_adapted_stand_alone(tmp_path, targets, ones):
    adapted = opened(tmp_path, target_modules=targets)
    tensors, untied = made(adapted)
    assert tensors.keys() == {HEAD, TABLE}
    original = qwen(True).lm_head.weight
    for key, tensor in tensors.items():
        assert torch.equal(tensor, torch.ones_like(tensor) if key in ones else original)
    assert len(untied) == 1
    assert config_of(adapted, None, untied)["tie_word_embeddings"] is False


def test_tables_that_are_not_adapted_stay_tied(tmp_path):
    adapted = opened(tmp_path, target_modules=["q_proj"])
    tensors, untied = made(adapted, torch.bfloat16)
    assert tensors.keys() == {f"model.layers.{number}.self_attn.q_proj.weight" for number in range(2)}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert untied == []
    config = config_of(adapted, torch.bfloat16, untied)
    assert (config["tie_word_embeddings"], config["dtype"]) == (True, "bfloat16")


def test_trained_rows_go_into_the_table_that_all_share(tmp_path):
    adapted = opened(tmp_path, target_modules=["q_proj"], trainable_token_indices=[1, 3])
    rows = adapted.model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    rows.data.fill_(7.0)
    tensors, untied = made(adapted)
    assert HEAD not in tensors
    assert untied == []
    changed = (tensors[TABLE] != qwen(True).lm_head.weight).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 3]


def test_options_tell_one_adapter_from_another(tmp_path):
    first = options_of(opened(tmp_path / "a"), "merged")
    assert first == options_of(opened(tmp_path / "a"), "merged")
    assert first != options_of(opened(tmp_path / "a"), "exact")
    assert first != options_of(opened(tmp_path / "b", r=2), "merged")


def test_options_tell_one_base_from_another(tmp_path):
    pytest.importorskip("bitsandbytes")
    first = opened(tmp_path)
    other = AdaptedBase(first.checkpoint, [tmp_path / "adapter"], base_quantization="nf4")
    assert options_of(first, "merged") != options_of(other, "merged")


def test_what_is_not_in_the_files_is_named(tmp_path):
    adapted = opened(tmp_path)
    check_all(adapted)
    del adapted.names._groups["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UnreadableError, match=r"have no 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        check_all(adapted)
