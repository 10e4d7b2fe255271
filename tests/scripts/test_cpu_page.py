"""README's first sentence about costs, and the page of all suites."""

from typing import Any

from benchmarks import cpu_page


def price(tokens: int, median: float) -> dict[str, Any]:
    prices = {"default": {"ours / LoRA": {"median": median}}, "torch": {"ours / LoRA": {"median": 9.0}}}
    return {"setting": {"batch": 1, "seq_len": tokens}, "prices": prices}


def times(seconds: float, mib: float) -> dict[str, float]:
    return {"time_s": seconds, "saved_mib": mib}


def suite(
    name: str, quantity: str, ours: float, theirs: float, *, device: str = "x CPU", **setting: Any
) -> dict[str, Any]:
    contenders = {"dora": {"ratio": ours}, "peft_dora": {"ratio": theirs}}
    setting = {"batch": 2, "seq_len": 256, "checkpointing": "none", **setting}
    result = {"quantity": quantity, "setting": setting, "contenders": contenders}
    return {"device": device, "options": {"suite": name}, "results": [result]}


def test_the_claim_is_of_results_alone() -> None:
    assert cpu_page.claim({}) == ""
    reports = {
        "price_cpu": {"settings": {"a": price(256, 0.91), "b": price(300, 1.04), "short": price(8, 3.0)}},
        "step": suite("step", "time_ms", 1.03, 1.5),
        "trained": {"methods": {"lora": times(2.0, 10.0), "dora": times(1.7, 6.0), "peft_dora": times(2.6, 19.0)}},
        "step_short": suite("step", "time_ms", 7.0, 8.0, seq_len=14),
        "step_cuda": suite("step", "time_ms", 7.0, 8.0, device="Some GPU"),
        "memory": suite("memory", "saved_mib", 1.1, 2.0),
        "memory_bf16": suite("memory", "saved_mib", 0.7, 1.9),
        "memory_checkpointing": suite("memory", "saved_mib", 5.0, 5.0, checkpointing="reentrant"),
        "peak": suite("memory", "peak_mib", 6.0, 6.0),
    }
    said = cpu_page.claim(reports)
    assert "0.85 to 1.04 of PEFT LoRA's time" in said
    assert "keeps 0.60 to 1.10 of its bytes" in said
    assert said.endswith("`use_dora` takes 1.30 to 1.50 and keeps 1.90 to 2.00.")
    del reports["memory"], reports["memory_bf16"], reports["trained"]
    assert cpu_page.claim(reports) == ""


def test_a_page_without_results_says_so() -> None:
    assert cpu_page.cpu_page({}).count("not measured yet") == 3
