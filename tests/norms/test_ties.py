"""Which rows of W0 are zero and stay tied (c = 1): the record, initialisations, sums, copies."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from ties_fixtures import (
    LAYERS,
    RANGES,
    ROWS,
    One,
    adapted,
    base,
    edit,
    example,
    is_tied,
    layer_of,
    train,
    without_record,
)
from torch import nn

from dora_peft import DoraConfig
from dora_peft._row_ranges import checked_record, recorded, to_mask, to_ranges
from dora_peft.norms.ties import settle_late
from dora_peft.plugin.configs import plain_peft_configs

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False) but the target module is"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume"),
]


def test_ranges_and_masks():
    mask = torch.tensor([True, True, False, True, False, False, True])
    assert to_ranges(mask) == [[0, 2], [3, 4], [6, 7]]
    assert torch.equal(to_mask(to_ranges(mask), 7), mask)
    assert to_ranges(torch.zeros(3, dtype=torch.bool)) == []
    assert to_mask([], 3) is None
    for wrong in ([[0, 9]], [[-1, 2]], [[2, 2]]):
        with pytest.raises(ValueError, match="of a layer with 7 rows"):
            to_mask(wrong, 7)


def test_a_record_for_other_names_says_nothing_about_ours():
    record = {"a": [[0, 1]]}
    assert recorded(None, "a", 2, {"a"}) is False
    assert recorded(record, "a", 2, {"a", "b"}).tolist() == [True, False]
    assert recorded(record, "b", 2, {"a", "b"}) is None
    assert recorded(record, "renamed.a", 2, {"renamed.a"}) is False


@pytest.mark.parametrize("wrong", [[], {"a": 3}, {"a": [3]}, {"a": [[1]]}, {"a": [["0", "1"]]}, {"a": [[0, True]]}])
def test_a_damaged_record_is_named(wrong):
    with pytest.raises(ValueError, match=r"tied_rows.*expected \{module name"):
        checked_record(wrong, "tied_rows")


@pytest.mark.parametrize("zero_rows", [True, False])
def test_the_folder_says_which_rows_are_tied(zero_rows, tmp_path):
    train(adapted("linear"), zero_rows).save_pretrained(tmp_path)
    own = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]["dora_peft"]
    assert own["tied_rows"] == {"layer": RANGES}
    assert own["filled_rows"] == ({} if zero_rows else {"layer": RANGES})
    assert DoraConfig.from_pretrained(str(tmp_path)).tied_rows == {"layer": RANGES}


def test_a_folder_without_zero_rows_says_that_there_are_none(tmp_path):
    get_peft_model(One(nn.Linear(4, 4)), DoraConfig(target_modules=["layer"])).save_pretrained(tmp_path)
    assert DoraConfig.from_pretrained(str(tmp_path)).tied_rows == {}


def test_rows_that_the_layer_does_not_have_are_refused(tmp_path):
    adapted("linear").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(
        path.read_text()
        .replace("[\n            5,\n            6", "[\n            5,\n            60")
        .replace("6\n", "60\n")
    )
    with pytest.raises(ValueError, match=r"rows 5:60 of a layer with 8 rows"):
        PeftModel.from_pretrained(base("linear"), tmp_path)


@pytest.mark.parametrize("known", [True, False], ids=["recorded", "guessed"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d", "embedding", "grouped", "depthwise"])
def test_magnitude_only_modules(kind, known, tmp_path):

    config = DoraConfig(r=2, target_modules=["other"], magnitude_only_modules=["layer"])

    def net():
        both = base(kind)
        both.other = nn.Linear(2, 2)
        return both

    model = get_peft_model(net(), config).eval()
    layer = layer_of(model)
    with torch.no_grad():
        layer.magnitude("default").view(-1)[[2, 3, 4, 6, 7]] *= 1.5
        expected = model(example(kind))
    model.save_pretrained(tmp_path)
    if not known:
        without_record(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path).eval()
    layer = layer_of(loaded)
    assert not any(factor.any() for factor in layer.factor_parameters("default"))
    assert is_tied(layer)
    with plain_peft_configs(), torch.no_grad():
        plain = PeftModel.from_pretrained(net(), tmp_path).eval()(example(kind))
    with torch.no_grad():
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loaded(example(kind)), expected, rtol=1e-4, atol=1e-5)
        if kind not in ("grouped", "depthwise"):
            merged = loaded.merge_and_unload()
            torch.testing.assert_close(merged(example(kind)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combination_type", ["cat", "svd"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d", "embedding"])
def test_a_row_tied_in_all_parts_is_tied_in_their_sum(kind, combination_type):
    model = train(adapted(kind))
    model.add_adapter("other", DoraConfig(r=4, target_modules=["layer"]))
    train(model, adapter="other")
    if kind == "conv2d" and combination_type == "svd":
        pytest.skip("as for the other kinds")
    model.base_model.add_weighted_adapter(
        ["default", "other"], [0.7, 0.5], "sum", combination_type=combination_type, svd_rank=3
    )
    edit(layer_of(model), "sum")
    assert is_tied(layer_of(model), "sum")


def test_a_row_tied_in_one_part_only_is_not_tied_in_the_sum():
    model = train(adapted("linear"))
    model.add_adapter("other", DoraConfig(r=4, target_modules=["layer"]))
    layer_of(model)._norms["other"].tied = None
    model.base_model.add_weighted_adapter(["default", "other"], [0.7, 0.5], "sum")
    assert layer_of(model)._norms["sum"].tied is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", LAYERS)
def test_copies_keep_them(kind, duplicate, tmp_path):
    train(adapted(kind)).save_pretrained(tmp_path)
    copied = duplicate(PeftModel.from_pretrained(base(kind), tmp_path))
    edit(layer_of(copied))
    assert is_tied(layer_of(copied))
    assert copied.peft_config["default"].tied_rows == {"layer": RANGES}


def test_saving_does_not_change_the_model():
    model = train(adapted("grouped"), zero_rows=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    get_peft_model_state_dict(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "pissa_niter_2", "olora", "gaussian"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_initialisations_that_blur_zero_rows(kind, init):
    """Their rounding noise is no direction: the rows are tied as with any other initialisation."""
    if (kind, init) == ("Conv1D", "olora"):
        pytest.skip("PEFT subtracts the untransposed product from a transposed weight")
    model = adapted(kind, init_lora_weights=init)
    layer = layer_of(model)
    assert layer._norms["default"].tied.nonzero()[:, 0].tolist() == ROWS
    with torch.no_grad():
        torch.testing.assert_close(model(example(kind)), base(kind)(example(kind)))
    edit(layer)
    assert (layer.scale("default")[ROWS] == 1).all()


def test_a_base_that_comes_after_its_adapter(tmp_path):
    """Its rows are found once it is here, at the latest at the first use."""
    train(adapted("linear")).save_pretrained(tmp_path)
    without_record(tmp_path)
    model = PeftModel.from_pretrained(base("linear").to("meta"), tmp_path)
    layer = layer_of(model)
    with pytest.raises(RuntimeError, match=r"'layer' is on the meta device"):
        settle_late(layer, "default")
    layer.base_layer.load_state_dict(base("linear").layer.state_dict(), assign=True)
    assert settle_late(layer, "default").nonzero()[:, 0].tolist() == ROWS
    edit(layer)
    assert is_tied(layer)
