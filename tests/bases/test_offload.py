"""Base weights that accelerate keeps on the CPU or on disk between calls: whatever LoRA does over them, DoRA does."""

import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dora_peft import DoraConfig, DoraLayer
from dora_peft.bases import base_weight
from dora_peft.bases.offload import at_hand, hook_of, is_away
from dora_peft.bases.offloaded import Offloaded

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter in the checkpoint to a meta parameter"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume"),
]
IDS = torch.arange(12).view(2, 6)
TARGETS = ["embed", "up", "down", "conv", "grouped"]
HALF = {"embed": "cpu", "up": "disk", "down": "cpu", "conv": "disk", "grouped": "cpu", "head": "cpu"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(12, 8), nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.conv, self.grouped = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(self.grouped(self.conv(x.transpose(1, 2))).transpose(1, 2))


def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        # tied rows
        model.up.weight[:3] = 0
    return model


def config(kind, **options):
    return kind(r=4, lora_alpha=6, target_modules=TARGETS, **options)


@torch.no_grad()
def train(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def offload_cpu(model, folder):
    return cpu_offload(model, execution_device="cpu")


def offload_disk(model, folder):
    return disk_offload(model, str(folder / "disk"), execution_device="cpu")


def dispatch(model, folder):
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    places = {f"{prefix}{name}": place for name, place in HALF.items()}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "dispatched"), force_hooks=True)


WAYS = [offload_cpu, offload_disk, dispatch]


def the_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def away(model):
    return [layer.name for layer in model.modules() if isinstance(layer, DoraLayer) and is_away(layer.get_base_layer())]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_creating_evaluating_and_saving(way, tmp_path):
    """Over a base that is offloaded already."""
    torch.manual_seed(3)
    expected_model = get_peft_model(net(), config(DoraConfig))
    torch.manual_seed(3)
    model = get_peft_model(way(net(), tmp_path), config(DoraConfig))
    assert away(model)
    for name, parameter in expected_model.named_parameters():
        if "lora_" in name:
            the_same(model.get_parameter(name), parameter)
    train(model), train(expected_model)
    with torch.no_grad():
        expected = expected_model(IDS)
        the_same(model(IDS), expected)
        the_same(model(IDS), expected)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        the_same(PeftModel.from_pretrained(net(), tmp_path / "adapter").eval()(IDS), expected)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_offloading_an_adapted_model(way, tmp_path):
    """The adapter is read without a call of its modules, so it stays."""
    model = train(get_peft_model(net(), config(DoraConfig)))
    with torch.no_grad():
        expected = model(IDS)
        way(model, tmp_path)
        assert away(model)
        assert not any(p.is_meta for n, p in model.named_parameters() if "lora_" in n)
        the_same(model(IDS), expected)
        the_same(model(IDS), expected)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_training(way, tmp_path):
    """LoRA does not train here: PEFT leaves the factors over an offloaded base on the meta device."""

    def gradients(model):
        train(model).train()
        losses = []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(IDS).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(3)
    expected_losses, expected = gradients(get_peft_model(net(), config(DoraConfig)))
    torch.manual_seed(3)
    losses, found = gradients(get_peft_model(way(net(), tmp_path), config(DoraConfig)))
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert expected_losses[-1] < expected_losses[0]
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        the_same(found[name], grad)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_full_gradient(way, detach, tmp_path):
    found = []
    for base in (net(), way(net(), tmp_path)):
        torch.manual_seed(3)
        model = train(get_peft_model(base, config(DoraConfig, detach_norm=detach)))
        model(IDS).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_loading_and_hot_swapping(way, tmp_path):
    model = train(get_peft_model(net(), config(DoraConfig)))
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(IDS)
        loaded = get_peft_model(way(net(), tmp_path), config(DoraConfig)).eval()
        loaded.load_adapter(str(tmp_path / "adapter"), "second")
        loaded.set_adapter("second")
        the_same(loaded(IDS), expected)
        loaded.set_adapter("default")
        loaded.base_model.hotswap_adapter(str(tmp_path / "adapter"))
        assert loaded.base_model.model.up._norms["default"].tied.nonzero()[:, 0].tolist() == [0, 1, 2]
        the_same(loaded(IDS), expected)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_merging(way, tmp_path):
    """As LoRA does: through the model, which brings the weights in. A layer of its own says so."""
    targets = {"target_modules": ["embed", "up", "down", "conv"]}
    model = train(get_peft_model(way(net(), tmp_path), DoraConfig(r=4, **targets)))
    with torch.no_grad():
        expected, plain = model(IDS), net()(IDS)
        with pytest.raises(NotImplementedError, match=r"module 'up'.*meta device.*merge_adapter"):
            model.base_model.model.up.merge()
        model.merge_adapter()
        the_same(model(IDS), expected)
        model.unmerge_adapter()
        the_same(model(IDS), expected)
        with model.disable_adapter():
            the_same(model(IDS), plain)
        merged = model.merge_and_unload()
        the_same(merged(IDS), expected)


def test_the_seam_equals_the_one_in_memory():
    layer = net().up
    here = base_weight(layer, "up")
    cpu_offload(layer, execution_device="cpu")
    assert layer.weight.is_meta
    seam = base_weight(layer, "up")
    assert isinstance(seam, Offloaded)
    A, g, index = torch.randn(2, 8), torch.randn(16, 3), torch.tensor([1, 4])
    the_same(seam.row_norms_squared(), here.row_norms_squared())
    the_same(seam.times(A), here.times(A))
    the_same(seam.vjp(g), here.vjp(g))
    the_same(seam.rows(index), here.rows(index))
    the_same(seam.block(2, 5), here.block(2, 5))
    the_same(seam.dense(), here.dense())
    the_same(torch.cat([rows for _, _, rows in seam.blocks()]), here.dense())
    the_same(seam.replacement(lambda rows, start, stop: 2 * rows), 2 * here.dense())
    assert layer.weight.is_meta


def test_at_hand_nests_and_does_nothing_elsewhere():
    layer = nn.Linear(3, 4)
    weight = layer.weight
    with at_hand(layer):
        assert layer.weight is weight
    add_hook_to_module(layer, ModelHook())
    # appended: a SequentialHook
    cpu_offload(layer, execution_device="cpu")
    assert hook_of(layer) is not None
    with at_hand(layer):
        with at_hand(layer):
            assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.weight, weight)
    assert layer.weight.is_meta
    with pytest.raises(KeyError), at_hand(layer):
        raise KeyError
    assert layer.weight.is_meta


def test_a_disk_offloaded_grouped_convolution_is_refused_by_name(tmp_path):
    train(get_peft_model(net(), config(DoraConfig))).save_pretrained(tmp_path)
    base = net()
    base.grouped.to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"grouped convolution '.*grouped'.*meta device"):
            PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("kind", [LoraConfig, DoraConfig])
def test_training_where_lora_trains(kind, tmp_path):
    """Adapters on modules that are here, gradients through others that are not."""
    found = []
    for base in (net(), dispatch(net(), tmp_path)):
        torch.manual_seed(3)
        model = train(get_peft_model(base, kind(r=2, target_modules=["embed", "down"])))
        model(IDS).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        the_same(found[1][name], grad)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_change_an_offloaded_base_are_refused(init):
    base = cpu_offload(net(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"'up' is offloaded.*in memory"):
        get_peft_model(base, DoraConfig(r=2, target_modules=["up"], init_lora_weights=init))
    assert isinstance(base.up, nn.Linear)
