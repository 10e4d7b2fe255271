"""The weight-decomposition analysis during training."""

import copy
import json
import time

import pytest
import torch
from analysis_fixtures import assert_equal, at, config, dense, fit, llama, trained
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from dora_peft.analysis import DecompositionCallback, decompose, decompose_folder

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


@pytest.mark.parametrize("kind", ["lora", "peft_dora", "dora", "full"])
@pytest.mark.cached_norms
def test_the_callback_records_what_decompose_finds(kind, tmp_path):
    base = llama()
    model = llama() if kind == "full" else get_peft_model(llama(), config(kind, init_lora_weights=True))
    path = tmp_path / "deep" / "pattern.json"
    callback = DecompositionCallback(steps=2, path=path)
    start = time.perf_counter()
    fit(model, tmp_path, callback)
    assert 0 < callback.seconds < time.perf_counter() - start
    assert sorted({entry["step"] for entry in callback.history}) == [2, 4, 5]
    assert json.loads(path.read_text()) == callback.history
    assert [entry.name for entry in path.parent.iterdir()] == ["pattern.json"]
    earlier, found = at(callback.history, 2), at(callback.history, 5)
    assert_equal(found, decompose(model, reference=base if kind == "full" else None), rel=1e-12)
    if kind != "full":
        assert_equal(found, dense(model))
    # a second training begins anew, where this one ended
    second = copy.deepcopy(model)
    fit(second, tmp_path, callback, 1)
    assert sorted({entry["step"] for entry in callback.history}) == [1]
    if kind == "full":
        assert_equal(at(callback.history, 1), decompose(second, reference=model), rel=1e-12)
    assert all(0 < earlier[name].direction < found[name].direction for name in found)


def test_recording_does_not_change_training(tmp_path):
    losses = []
    for steps in (1, 100):
        torch.manual_seed(0)
        model = get_peft_model(llama(), config("dora", init_lora_weights=True))
        trainer = fit(model, tmp_path, DecompositionCallback(steps), logging_steps=1, seed=1)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 5
    assert losses[0] == losses[1]


def test_a_resumed_run_goes_on_from_its_records(tmp_path):
    def start(**options):
        torch.manual_seed(0)
        callback = DecompositionCallback(1, tmp_path / "pattern.json")
        model = get_peft_model(llama(), config("dora", init_lora_weights=True))
        fit(model, tmp_path, callback, save_strategy="steps", save_steps=2, **options)
        return callback.history

    whole = start(max_steps=4)
    assert {entry["step"] for entry in whole} == {1, 2, 3, 4}
    resumed = start(max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert [(e["step"], e["module"]) for e in resumed] == [(e["step"], e["module"]) for e in whole]
    assert at(resumed, 1) == at(whole, 1)
    assert_equal(at(resumed, 4), at(whole, 4), rel=1e-5)


def test_full_fine_tuning_resumes_only_with_a_reference(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    fit(llama(), tmp_path, DecompositionCallback(2), 2, **options)
    with pytest.raises(ValueError, match=r"resumes at step 2.*`reference`"):
        fit(llama(), tmp_path, DecompositionCallback(2), 4, resume=str(tmp_path / "checkpoint-2"), **options)
    callback = DecompositionCallback(2, reference=llama())
    trainer = fit(llama(), tmp_path, callback, 4, resume=str(tmp_path / "checkpoint-2"), **options)
    assert_equal(at(callback.history, 4), decompose(trainer.model, reference=llama()), rel=1e-12)


def test_the_last_record_is_not_of_the_best_model(tmp_path):
    callback = DecompositionCallback(2)
    rows = torch.randint(3, 32, (4, 6))
    model = get_peft_model(llama(), config("lora", init_lora_weights=True))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=1e-2,
        greater_is_better=True,
        metric_for_best_model="loss",
        # the "best" model is that of the first step
    )
    data = [{"input_ids": row, "labels": row.clone()} for row in rows]
    Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback]).train()
    last = decompose_folder(llama(), tmp_path / "checkpoint-3")
    assert_equal(at(callback.history, 3), last, rel=1e-9)
    # or the test shows nothing
    assert decompose(model) != last


def test_a_run_that_stops_early_records_its_end(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    callback = DecompositionCallback(2)
    model = get_peft_model(llama(), config("lora", init_lora_weights=True))
    trainer = fit(model, tmp_path, callback, extra=Stop())
    assert sorted({entry["step"] for entry in callback.history}) == [2, 3]
    assert_equal(at(callback.history, 3), decompose(model), rel=1e-12)
    # unless other weights have taken the place of the last step's
    before, trainer.state.global_step = list(callback.history), 4
    arguments = type("Arguments", (), {"load_best_model_at_end": True})()
    callback.on_train_end(arguments, trainer.state, None, model=model)
    assert callback.history == before


def test_other_processes_and_bad_intervals():
    callback = DecompositionCallback(1)
    state = type("State", (), {"is_world_process_zero": False, "global_step": 1, "max_steps": 1})()
    callback.on_train_begin(None, state, None, model=None)
    callback.on_step_end(None, state, None, model=None)
    assert callback.history == []
    state.is_world_process_zero, state.global_step = True, 0
    with pytest.raises(ValueError, match="adapter named 'other'"):
        DecompositionCallback(1, adapter="other").on_train_begin(None, state, None, model=trained("dora"))
    with pytest.raises(ValueError, match="at least 1, found 0"):
        DecompositionCallback(0)
