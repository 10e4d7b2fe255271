"""transformers' Trainer and TRL's SFTTrainer and DPOTrainer train, save and resume a DoRA adapter."""

import math
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from trainer_fixtures import arguments, llama, losses, tokenizer
from transformers import Trainer, TrainingArguments

from dora_peft import DoraConfig, DoraLayer

IDS = torch.arange(12).view(2, 6)
# What the libraries say about themselves; none of it concerns an adapter.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    # PEFT 0.20 only: it looks for the config of a base model without a name
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume"),
]


def dora():
    return DoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")


def samples(count=16):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 32, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_trainer_trains_saves_and_resumes_with_the_same_losses(tmp_path):
    def trainer(folder, **options):
        model = get_peft_model(llama(), dora())
        return Trainer(model, TrainingArguments(**arguments(folder, max_steps=4, **options)), train_dataset=samples())

    whole = trainer(tmp_path / "whole")
    before = adapter(whole.model)
    whole.train()
    assert len(losses(whole)) == 4
    moved = {name for name, value in adapter(whole.model).items() if not torch.equal(value, before[name])}
    assert {n.split(".lora_")[1].partition(".")[0] for n in moved} == {"A", "B", "magnitude_vector"}

    # the first two steps' checkpoint, continued in a new model
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    after = adapter(resumed.model)
    for name, value in adapter(whole.model).items():
        assert torch.equal(after[name], value), name

    checkpoint = tmp_path / "whole" / "checkpoint-4"
    loaded = PeftModel.from_pretrained(llama(), checkpoint)
    assert type(loaded.peft_config["default"]) is DoraConfig
    torch.testing.assert_close(logits(loaded), logits(whole.model), rtol=1e-5, atol=1e-5)


def test_trainer_loads_the_best_adapter_at_the_end(tmp_path):
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    model = get_peft_model(llama(), dora())
    # so large a rate that the loss only rises and the first checkpoint is the best
    args = TrainingArguments(**arguments(tmp_path, **options, warmup_steps=0) | {"learning_rate": 3.0})
    trainer = Trainer(model, args, train_dataset=samples(), eval_dataset=samples(4))
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    for name, value in adapter(trainer.model).items():
        assert torch.equal(best[name.replace(".default", "")], value), name


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(tmp_path):
    """The norm must not be refreshed, nor m tied, between the micro-batches of one step."""

    def step(batch, accumulation):
        config = dora()
        config.lora_dropout = 0.0
        model = get_peft_model(llama(), config)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        trainer = Trainer(model, TrainingArguments(**arguments(tmp_path, **options)), train_dataset=samples())
        trainer.train()
        return adapter(model)

    whole, parts = step(4, 1), step(1, 4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_sft_trainer_takes_the_config(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["the cat sat on a mat", "a dog ran and sat", "the dog ran on"] * 4})
    args = trl.SFTConfig(**arguments(tmp_path, max_steps=2), max_length=16, bf16=False, gradient_checkpointing=True)
    with warnings.catch_warnings():
        # TRL's remarks on the tokenizer and on its own defaults
        warnings.simplefilter("ignore")
        trainer = trl.SFTTrainer(llama(), args, train_dataset=data, processing_class=tokenizer(), peft_config=dora())
        assert any(isinstance(m, DoraLayer) for m in trainer.model.modules())
        before = adapter(trainer.model)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
    assert len(losses(trainer)) == 2
    after = adapter(trainer.model)
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        names = [n for n in before if part in n]
        assert names
        assert any(not torch.equal(after[n], before[n]) for n in names), part
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "saved")
    assert type(loaded.peft_config["default"]) is DoraConfig
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=1e-5, atol=1e-5)


# the checking mode would find a stale one by itself
@pytest.mark.cached_norms
@pytest.mark.parametrize("spread", [False, True], ids=["one-device", "two-devices"])
@pytest.mark.parametrize("precompute", [False, True], ids=["while-training", "precomputed"])
def test_dpo_trainer_starts_at_the_trained_adapter(tmp_path, precompute, spread):
    """It copies the trained adapter to a frozen one through `.data`: the first loss is that of equal policies, ln 2."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    config = dora()
    config.lora_dropout = 0.0
    model = get_peft_model(llama(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=generator))
            elif "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    if spread:
        # as `device_map="auto"` leaves it; the trainer then moves nothing, and `.to()` refreshes no norm
        model.get_base_model().hf_device_map = {"model": 0, "lm_head": 1}
    policy = logits(model)
    pairs = {"prompt": "the cat", "chosen": "sat on a mat", "rejected": "ran on a dog"}
    data = datasets.Dataset.from_list([pairs] * 4)
    with warnings.catch_warnings():
        # TRL's remarks on the tokenizer and on its own defaults
        warnings.simplefilter("ignore")
        args = trl.DPOConfig(**arguments(tmp_path, max_steps=3), bf16=False, precompute_ref_log_probs=precompute)
        trainer = trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer())
        trainer.train()
    found = losses(trainer)
    assert abs(found[0] - math.log(2)) < 1e-5
    assert found[2] < found[1] < found[0]
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), policy, rtol=1e-5, atol=1e-5)
