"""Several threads: a model trains or evaluates beside others that are made, copied and dropped."""

import copy
import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn

import dora_peft
from dora_peft import DoraConfig

# Triton's interpreter runs in one thread
pytestmark = [pytest.mark.cached_norms, pytest.mark.implementation("torch")]


def make(seed=0):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    return get_peft_model(base, DoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False))


def together(*functions):
    """Run them at once, each until it ends; raise what any of them raises."""
    failures, start = [], threading.Barrier(len(functions), timeout=60)

    def guarded(function):
        try:
            start.wait()
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_training_beside_a_thread_that_makes_and_copies_models():
    model = make()
    # a new one each time: each looks at every magnitude there is in its first step
    trained = [p for p in model.parameters() if p.requires_grad]
    done = threading.Event()

    def train():
        try:
            for _ in range(60):
                optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)
                model(torch.randn(4, 12)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            done.set()

    def build():
        kept = []
        while not done.is_set():
            kept = [make(1), copy.deepcopy(make(2))]
        del kept

    together(train, build, build)


@pytest.mark.parametrize("edited", [False, True])
def test_two_threads_evaluate_one_model(edited):
    """With the same result as one, while a third makes and drops what evaluation keeps by calling `refresh`."""
    model, x = make().eval(), torch.randn(4, 12)
    with torch.no_grad():
        expected = model(x)
        if edited:
            # the first to come refreshes
            model.base_model.model[0].lora_B["default"].weight.data.mul_(2)
            with dora_peft.implementation("reference"):
                expected = model(x)
    done = threading.Event()

    def evaluate():
        try:
            with torch.no_grad():
                for _ in range(200):
                    torch.testing.assert_close(model(x), expected)
        finally:
            done.set()

    def disturb():
        while not done.is_set():
            dora_peft.refresh(model)

    together(evaluate, evaluate, disturb)


def test_two_threads_with_parameters_of_their_own():
    """`functional_call` swaps parameters in the module, so each thread has a module of its own around one base."""
    base, x = make().eval(), torch.randn(4, 12)
    twins = [copy.deepcopy(base, {id(p): p for n, p in base.named_parameters() if "lora_" not in n}) for _ in range(2)]
    for factor, twin in zip((2.0, -3.0), twins, strict=True):
        twin.base_model.model[0].lora_B["default"].weight.data.mul_(factor)
    with torch.no_grad(), dora_peft.implementation("reference"):
        expected = [twin(x) for twin in twins]

    def evaluate(number):
        def run():
            with torch.no_grad():
                for _ in range(100):
                    torch.testing.assert_close(twins[number](x), expected[number])

        return run

    together(evaluate(0), evaluate(1))
