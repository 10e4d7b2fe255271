"""Batches that mix adapters: each sample as with its own adapter alone, and what cannot be mixed."""

from contextlib import nullcontext

import pytest
import torch
from model_fixtures import NAMES, X, differs, llama, mlp, output, same, two_adapters


@pytest.mark.parametrize("base", [mlp, llama])
def test_a_mixed_batch_is_each_sample_with_its_own_adapter(base):
    targets = list(NAMES) if base is mlp else ["embed_tokens", "q_proj", "down_proj"]
    model = two_adapters(base, target_modules=targets)
    inputs = X if base is mlp else torch.arange(24).view(4, 6)
    names = ["second", "__base__", "default", "second"]
    mixed = output(model, inputs, adapter_names=names)
    for index, name in enumerate(names):
        sample = inputs[index : index + 1]
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else nullcontext():
            same(mixed[index : index + 1], output(model, sample))
    differs(mixed[0], mixed[3])


def test_a_mixed_batch_generates_with_beams():
    model = two_adapters(llama, target_modules=["q_proj", "down_proj"])
    prompts = torch.arange(12).view(3, 4) + 1
    names = ["__base__", "default", "second"]
    for options in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(3, 4), **options}
        mixed = model.generate(input_ids=prompts, adapter_names=names, **options)
        alone = []
        options["attention_mask"] = torch.ones(1, 4)
        for index, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
            with model.disable_adapter() if name == "__base__" else nullcontext():
                alone.append(model.generate(input_ids=prompts[index : index + 1], **options))
        assert torch.equal(mixed, torch.cat(alone))
        assert len({tuple(row[4:].tolist()) for row in mixed}) > 1


def test_a_mixed_batch_leaves_no_hooks_behind():
    model = two_adapters()
    before, hooks = output(model), [dict(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match=r"Length of `adapter_names`.*2 and 4"):
        output(model, X, adapter_names=["default", "second"])
    assert torch.equal(output(model), before)
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_what_a_mixed_batch_cannot_do_is_refused():
    model = two_adapters()
    names = ["default"] * len(X)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): third"):
        output(model, X, adapter_names=["third", *names[1:]])
    with pytest.raises(ValueError, match="training mode"):
        output(model.train(), X, adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        output(model, X, adapter_names=names)
