"""c W0 and the plain LoRA c s B A are W' together, over every kind of layer; what rounding costs is said."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_fixtures import MERGEABLE, Truth, adapted, base_of, dense_base, dora, example, perturb, with_two_adapters
from torch import nn

from dora_peft import DoraConfig
from dora_peft.adapters.export.fingerprint import digest_of
from dora_peft.adapters.export.splitting import Loss, loss_of, scaled, split
from dora_peft.layers.merge import parts


def taken_apart(model, dtype=torch.float64):
    """The parts of W', c W0 in the layer's layout, and the factors of the plain LoRA."""
    layer = dora(model)
    with torch.no_grad():
        found = parts(layer, list(layer.scaling), layer.base_weight())
        whole = split(found)
        return layer, found, scaled(layer, whole.scale, dtype), whole


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@settings(deadline=None)
@given(
    st.sampled_from(MERGEABLE),
    st.fixed_dictionaries(
        {},
        optional={
            "use_rslora": st.just(True),
            "lora_alpha": st.sampled_from([1, 16]),
            "magnitude_only_modules": st.just(["layer"]),
            "rank_pattern": st.just({"layer": 2}),
            "alpha_pattern": st.just({"layer": 5}),
        },
    ),
    st.booleans(),
    st.booleans(),
)
def test_both_together_are_the_merged_weight(kind, options, two, zero):
    """With rows of zeros, magnitude-only modules, patterns and rsLoRA, and with a second adapter over the first."""
    # the reference divides by the norm of a row of zeros, and knows ties of one adapter alone
    assume(not (two and zero and "magnitude_only_modules" in options))
    if "magnitude_only_modules" in options:
        options = {**options, "target_modules": []}
    model = adapted(kind, torch.float64, **options)
    if two:
        model.add_adapter("second", DoraConfig(r=2, target_modules=["layer"]))
        perturb(dora(model), "second", seed=7)
        model.double()
    if zero:
        with torch.no_grad():
            # of an embedding a row of the matrix is a column of the table
            dora(model).kind.matrix(base_of(model), base_of(model).weight)[1] = 0
    names = list(dora(model).scaling)
    only_m = torch.full((dora(model).base_weight().out_features,), False)
    only_m[1] = zero and "magnitude_only_modules" in options
    truth = Truth(model, example(model), adapters=names, tied=only_m)
    layer, found, served, whole = taken_apart(model)
    together = dense_base(base_of(model), served) + whole.lora_B @ whole.lora_A
    assert distance(together, truth.matrix) < 1e-12
    assert bool(whole.lora_B.any()) != ("magnitude_only_modules" in options and not two)
    loss = loss_of(layer, found, served, (whole.lora_A, whole.lora_B))
    assert loss.error_over_update < 1e-12
    assert loss.lost == 0


def test_a_row_of_zeros_that_is_tied_stays_as_it_is():
    """Its c is 1, and only the LoRA changes it."""
    layer = nn.Linear(12, 10)
    model = adapted(layer, torch.float64)
    with torch.no_grad():
        base_of(model).weight[3] = 0
    model.delete_adapter("default")
    model.add_adapter("default", DoraConfig(r=2, target_modules=["layer"]))
    perturb(dora(model), "default")
    _, found, served, whole = taken_apart(model)
    assert whole.scale[3] == 1
    assert not served[3].any()
    assert found[0][3][3] == 1


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 9), (torch.float16, 12)])
def test_rows_that_come_out_as_they_were_are_counted(dtype, bits):
    """In bf16 |c - 1| below 2^-9 is lost, fp16 resolves eight times finer; and the error says what that costs."""
    model = adapted("linear-no-bias", torch.float32)
    base = base_of(model)
    with torch.no_grad():
        # numbers of the dtype that have no bits to spare above 1, where c - 1 weighs least
        base.weight.copy_(1 + torch.rand_like(base.weight)).copy_(base.weight.to(dtype))
        layer = dora(model)
        layer.lora_B["default"].weight.zero_()
        c = torch.ones(10)
        c[:4] += 2.0 ** -(bits + 2)
        c[4:7] += 2.0 ** -(bits - 3)
        norm = base.weight.norm(dim=1)
        layer.magnitude("default").copy_(c * norm)
    layer, found, served, whole = taken_apart(model, dtype)
    loss = loss_of(layer, found, served, (whole.lora_A, whole.lora_B))
    assert (loss.rows, loss.lost) == (7, 4)
    assert loss.share_lost == pytest.approx(4 / 7)
    error = (served.double() - c[:, None].double() * base.weight.double()).norm()
    assert loss.error == pytest.approx(error.item(), rel=1e-3)
    assert loss.update == pytest.approx(((c - 1)[:, None].double() * base.weight.double()).norm().item(), rel=1e-2)


def test_no_update_is_no_loss():
    assert Loss(0.0, 0.0, 0, 0, "").error_over_update == 0
    assert Loss(0.0, 0.0, 0, 0, "").share_lost == 0


def test_two_adapters_are_one_lora_of_both_ranks():
    model = with_two_adapters("linear")
    _, found, _, whole = taken_apart(model)
    assert whole.lora_A.shape == (6, 12)
    assert torch.equal(whole.scale, found[0][3] * found[1][3])
    assert torch.equal(whole.lora_B[:, 4:], (found[1][2] * found[1][3])[:, None] * found[1][1])


def test_the_digest_of_blocks_is_that_of_the_whole():
    model = adapted("linear", torch.float32)
    layer, found, served, whole = taken_apart(model, torch.float32)
    assert loss_of(layer, found, served, (whole.lora_A, whole.lora_B)).digest == digest_of(served)
