"""Blocks of W0 are read into one buffer for all layers of an operation, to the same bits as without it."""

import contextvars
import threading
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig, DoraLayer
from dora_peft.adapters import undo
from dora_peft.bases import base_weight, scratch

CPU = torch.device("cpu")
LAYERS, SCALING = 4, 2.0


def lent(elements=16, dtype=torch.float32):
    return scratch.lent(elements, dtype, CPU)


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_loans_share_a_buffer_and_do_not_overlap():
    with scratch.kept():
        with lent(5) as first, lent(7, torch.float64) as second:
            first.fill_(1)
            second.fill_(2)
            assert (first == 1).all()
            assert address(first) == address(second)
            before = first.data_ptr()
        with lent(9, torch.int64) as third:
            assert third.data_ptr() == before


def test_a_loan_that_is_never_given_back_is_not_lent_again():
    with scratch.kept():
        forgotten = lent()
        lost = forgotten.__enter__()
        with lent() as later:
            forgotten.__exit__(None, None, None)
            with lent() as last:
                last.fill_(3)
                later.fill_(4)
                assert (last == 3).all()
        assert lost.numel() == 16


def test_more_than_the_buffer_holds():
    with scratch.kept():
        with lent() as small, lent(scratch.CAPACITY) as large:
            assert address(small) != address(large)
        with lent(scratch.CAPACITY) as grown:
            kept = address(grown)
        with lent() as small:
            assert address(small) == kept


@pytest.mark.parametrize("fails", [False, True])
def test_the_buffer_is_freed_with_the_operation(fails):
    with pytest.raises(KeyError) if fails else nullcontext(), scratch.kept(), scratch.kept():
        with lent() as tensor:
            storage = StorageWeakRef(tensor.untyped_storage())
        del tensor
        assert not storage.expired()
        if fails:
            raise KeyError
    assert storage.expired()


def test_each_thread_has_its_own():
    found = []

    def borrow():
        with lent() as tensor:
            found.append(address(tensor))

    with scratch.kept(), lent() as own:
        # as Python starts them where threads inherit their context
        thread = threading.Thread(target=contextvars.copy_context().run, args=[borrow])
        thread.start()
        thread.join()
        assert found != [address(own)]


def test_a_buffer_made_in_inference_mode_serves_outside_of_it():
    with scratch.kept():
        with torch.inference_mode(), lent() as tensor:
            tensor.fill_(1)
        with lent() as tensor:
            tensor.fill_(2)


class Temporaries(TorchDispatchMode):
    """The storages of at least so many bytes that operators make in memory inside the mode."""

    def __init__(self, least):
        super().__init__()
        self.least, self.existing, self.found = least, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in filter(torch.is_tensor, tree_leaves((args, kwargs))):
            self._note(tensor, self.existing)
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            if not tensor.is_meta and tensor.untyped_storage().nbytes() >= self.least:
                self._note(tensor, self.found)
        return out

    def _note(self, tensor, where):
        # a weak reference keeps the storage's header, so no key is used twice
        reference = StorageWeakRef(tensor.untyped_storage())
        if reference.cdata not in self.existing and reference.cdata not in self.found:
            where[reference.cdata] = reference

    def gone(self):
        return sum(reference.expired() for reference in self.found.values())


def channels_last(layer):
    return layer.to(memory_format=torch.channels_last)


KINDS = {
    "linear": lambda: nn.Linear(320, 256),
    "linear-bf16": lambda: nn.Linear(320, 256).bfloat16(),
    "linear-fp16": lambda: nn.Linear(320, 256).half(),
    "conv1D": lambda: Conv1D(256, 320),
    "conv1D-bf16": lambda: Conv1D(256, 320).bfloat16(),
    "embedding": lambda: nn.Embedding(320, 256),
    "embedding-bf16": lambda: nn.Embedding(320, 256).bfloat16(),
    "conv2d": lambda: nn.Conv2d(96, 96, 3),
    "conv2d-bf16": lambda: nn.Conv2d(96, 96, 3).bfloat16(),
    "conv2d-channels_last": lambda: channels_last(nn.Conv2d(96, 96, 3)),
    "conv2d-channels_last-fp16": lambda: channels_last(nn.Conv2d(96, 96, 3).half()),
}


def stack(kind):
    torch.manual_seed(0)
    layers = nn.Sequential(*(KINDS[kind]() for _ in range(LAYERS)))
    with torch.no_grad():
        for layer in layers:
            # transformers' Conv1D starts from little
            layer.weight.copy_(torch.randn(layer.weight.shape))
    return layers.requires_grad_(False)


def adapted(base):
    config = DoraConfig(r=4, lora_alpha=4 * SCALING, target_modules=[str(i) for i in range(LAYERS)])
    return get_peft_model(base, config)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DoraLayer)]


def trained(kind):
    model, generator = adapted(stack(kind)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers_of(model):
            for factor in layer.factor_parameters("default"):
                factor.copy_(torch.randn(factor.shape, generator=generator))
            layer.magnitude("default").mul_(1.5)
    return model


def temporaries(kind):
    # less than a weight as it is stored, and more than any tensor of an adapter
    return Temporaries(stack(kind)[0].weight.nbytes // 2)


def created(kind, folder):
    base = stack(kind)
    with temporaries(kind) as seen:
        model = adapted(base)
    return seen.gone(), model


def loaded(kind, folder):
    trained(kind).save_pretrained(folder)
    base = stack(kind)
    with temporaries(kind) as seen:
        model = PeftModel.from_pretrained(base, folder)
    return seen.gone(), model


def loaded_beside(kind, folder):
    model = trained(kind)
    model.save_pretrained(folder)
    with temporaries(kind) as seen:
        model.load_adapter(folder, "second")
    return seen.gone(), model


def merged(kind, folder, **options):
    model = trained(kind)
    with temporaries(kind) as seen:
        model.merge_adapter(**options)
    return seen.gone(), model


def merged_safely(kind, folder):
    return merged(kind, folder, safe_merge=True)


OPERATIONS = [created, loaded, loaded_beside, merged, merged_safely]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_operation_makes_one_large_temporary_at_most(kind, operation, tmp_path):
    gone, _ = operation(kind, tmp_path)
    assert gone <= 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_temporaries_are_seen(operation, tmp_path, monkeypatch):
    monkeypatch.setattr(undo.scratch, "kept", nullcontext)
    gone, _ = operation("linear-bf16", tmp_path)
    assert gone >= LAYERS


class Widened(nn.Module):
    """Gives each layer an input of its own width."""

    def forward(self, x):
        return nn.functional.pad(x, (0, 320 - x.shape[-1]))


def test_a_forward_pass_after_a_step_makes_one_large_temporary():
    model = trained("linear-bf16")
    model.base_model.model = nn.Sequential(*(m for layer in layers_of(model) for m in (Widened(), layer)))
    with temporaries("linear-bf16") as seen:
        model(torch.ones(1, 320, dtype=torch.bfloat16))
    assert seen.gone() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_merged_weights_have_the_bits_of_plain_operations(kind):
    model = trained(kind)
    for layer in layers_of(model):
        base = layer.get_base_layer()
        seam = base_weight(base, "layer")
        A, B = layer.factors("default")
        # casting keeps the order of a transposed weight, in which its rows are summed
        wide = layer.kind.matrix(base, base.weight).float()
        assert torch.equal(seam.row_norms_squared(), torch.linalg.vector_norm(wide, dim=1).square())
        assert torch.equal(seam.times(A.float()), wide @ A.float().T)
        c = layer.scale("default")
        expected = (torch.addmm(wide, B.float(), A.float(), alpha=SCALING) * c[:, None]).to(base.weight.dtype)
        delta = torch.addmm(wide, B.float(), A.float(), alpha=SCALING) * c[:, None] - wide
        assert torch.equal(layer.get_delta_weight("default").float(), layer.kind.in_layout(base, delta).float())
        layer.merge()
        assert torch.equal(layer.kind.matrix(base, base.weight), expected)
