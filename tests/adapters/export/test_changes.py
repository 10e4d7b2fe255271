"""What `lora` approximates is W' - W0 of the merged model, block by block."""

import pytest
import torch
from export_fixtures import gpt2, qwen
from format_fixtures import llama, saved
from peft import PeftModel
from torch import nn

from dora_peft.adapters.export.adapted import AdaptedBase, kernel_of
from dora_peft.adapters.export.changes import changes
from dora_peft.adapters.formats import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


@pytest.mark.parametrize(
    ("make", "targets"),
    [(llama, "all-linear"), (qwen, ["embed_tokens", "q_proj"]), (gpt2, ["c_attn", "c_proj"])],
)
def test_changes_are_those_of_the_merged_model(tmp_path, make, targets):
    make().save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", make(), target_modules=targets)
    merged = PeftModel.from_pretrained(make(), tmp_path / "adapter").merge_and_unload()
    found = list(changes(AdaptedBase(Checkpoint(tmp_path / "base"), [tmp_path / "adapter"])))
    assert len(found) >= 2
    for change in found:
        layer = make().get_submodule(change.path)
        expected = (merged.get_submodule(change.path).weight - layer.weight).detach().double()
        expected = expected if isinstance(layer, nn.Linear) else expected.T
        assert (change.out_features, change.in_features) == tuple(expected.shape)
        assert change.embedding == isinstance(layer, nn.Embedding)
        # walked twice, as an approximation does
        for _ in range(2):
            rows = torch.cat([rows.clone() for _, _, rows in change.blocks()])
            assert rows.dtype == torch.float32
            torch.testing.assert_close(rows.double(), expected, rtol=0, atol=1e-6)
        lora_A, lora_B = change.factors()
        original = layer.weight.detach().double()
        original = original if isinstance(layer, nn.Linear) else original.T
        together = change.scale_change()[:, None].double() * original + lora_B.double() @ lora_A.double()
        torch.testing.assert_close(together, expected, rtol=0, atol=1e-6)


def test_kernels():
    assert kernel_of(nn.Conv2d(4, 6, (3, 2))) == (4, 3, 2)
    assert kernel_of(nn.Linear(4, 6)) == ()
