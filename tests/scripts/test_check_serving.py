"""What servers make of exports: what is made for them, that a wrong or refused answer is seen, and the table."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig

import check_serving
from common.serving_table import ENGINES, UNMEASURED, serving_table

SMALL = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=384, initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_serving, "MODELS", {"small": SMALL})
        patch.setattr(check_serving, "DTYPES", {name: check_serving.DTYPES[name] for name in ("fp32", "bf16")})
        check_serving.main(["make", str(folder)])
    return folder


@pytest.fixture(scope="module")
def plan(made):
    return json.loads((made / "cases.json").read_text())


@pytest.fixture(scope="module")
def truth(made, plan):
    return check_serving.truths(made, plan)["small"]


@pytest.fixture
def answer(made, plan, truth, tmp_path):
    """Write an engine's answers, right ones but for what is given, and compare."""

    def run(engine, **wrong):
        for path in made.glob("*.json"):
            if path.name != "cases.json":
                path.unlink()
        right = {"logprobs": truth["logprobs"], "tokens": truth["tokens"]}
        cases = {name: case for name, case in plan["cases"].items() if engine in case["engines"]}
        rows = {name: {"refused": "no DoRA"} if case["route"] == "dora" else right for name, case in cases.items()}
        for name, row in wrong.items():
            assert name in rows
            rows[name] = {**right, **row} if "refused" not in row else row
        (made / f"{engine}.json").write_text(json.dumps({"versions": {"vLLM": "9"}, "rows": rows}))
        check_serving.main(["compare", str(made), "--results", str(tmp_path)])
        return json.loads((tmp_path / "serving.json").read_text())

    return run


def test_every_form_is_made_and_what_it_does_to_the_model_is_known(made, plan, truth):
    routes = {(case["route"], case["dtype"]) for case in plan["cases"].values()}
    forms = ("dora", "exact", "lora", "gguf", "merged")
    assert routes == {(form, dtype) for form in forms for dtype in ("fp32", "bf16")}
    for case in plan["cases"].values():
        assert (made / case["base"] / "config.json").is_file()
        assert case["adapter"] is None or (made / case["adapter"]).exists()
    # far above the error of any dtype, or nothing could be told from an adapter that was dropped
    assert truth["update"] > 0.3
    assert (made / "small" / "base" / "tokenizer.model").is_file()
    assert {case["route"] for case in plan["cases"].values() if "sglang" not in case["engines"]} >= {"merged", "gguf"}


def test_right_answers_are_stored(answer, truth, capsys):
    report = answer("vllm")
    rows = {(row["route"], row["dtype"]): row for row in report["rows"]}
    assert rows["exact", "fp32"]["error"] == 0
    assert rows["exact", "fp32"]["greedy"] == rows["exact", "fp32"]["of"] == check_serving.NEW
    assert rows["dora", "fp32"]["refused"] == "no DoRA"
    assert 0 < rows["exact", "fp32"]["weights"] < rows["exact", "bf16"]["weights"] < 1
    assert report["updates"] == {"small": truth["update"]}
    assert "| 0, 0 |" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("route", ["exact", "lora", "merged"])
def test_a_wrong_answer_is_an_error(answer, truth, capsys, route, dtype):
    off = list(truth["logprobs"])
    off[3] += 1.1 * check_serving.BOUNDS[dtype] * truth["update"]
    with pytest.raises(SystemExit, match="1"):
        answer("vllm", **{f"small {route} {dtype}": {"logprobs": off}})
    assert f"'route': '{route}'" in capsys.readouterr().err


def test_what_the_base_alone_would_say_is_an_error(made, plan, answer):
    """An adapter that an engine dropped in silence."""
    model = check_serving.AutoModelForCausalLM.from_pretrained(made / "small" / "base", dtype=torch.float32)
    alone = check_serving.answers(model.eval(), plan["models"]["small"]["prompt"], check_serving.NEW)
    with pytest.raises(SystemExit, match="1"):
        answer("vllm", **{"small exact bf16": alone})


@pytest.mark.parametrize("row", [{"refused": "no such layer"}, {"logprobs": None}, {"tokens": None}])
def test_refusals_numbers_that_are_none_and_other_tokens_are_errors(answer, truth, row):
    if "logprobs" in row:
        row = {"logprobs": [math.nan] * len(truth["logprobs"])}
    if "tokens" in row:
        row = {"tokens": [*truth["tokens"][:-1], truth["tokens"][-1] + 1]}
    with pytest.raises(SystemExit, match="1"):
        answer("llama", **{"small exact fp32": row})


def test_missing_answers_are_seen(made, answer, plan, tmp_path):
    answer("vllm")
    given = json.loads((made / "vllm.json").read_text())
    del given["rows"]["small merged fp32"]
    (made / "vllm.json").write_text(json.dumps(given))
    with pytest.raises(SystemExit, match="small merged fp32"):
        check_serving.main(["compare", str(made), "--results", str(tmp_path)])


def test_a_scaling_that_sglang_would_apply_twice_is_an_error(plan, truth):
    case = plan["cases"]["small lora fp32"]
    assert check_serving.judge({"scaling": 1.0}, case, truth)["right"]
    assert not check_serving.judge({"scaling": 2.0}, case, truth)["right"]


def test_other_engines_and_models_keep_their_rows(answer):
    answer("llama")
    report = answer("vllm")
    assert {row["engine"] for row in report["rows"]} == {"llama", "vllm"}
    assert len(answer("vllm")["rows"]) == len(report["rows"])


def row(engine, route, dtype="fp32", model="tiny x", **outcome):
    return {"engine": engine, "model": model, "route": route, "dtype": dtype, "right": True, **outcome}


def test_the_table():
    rows = [
        row("vllm", "dora", refused="no DoRA"),
        row("vllm", "lora", "bf16", rank=128, error=0.05),
        row("vllm", "lora", "fp32", rank=128, error=2.4e-6),
        row("sglang", "lora", rank=128, scaling=1.0),
        row("vllm", "merged", "fp32", "SmolLM2", error=1e-3),
        row("vllm", "merged", "fp16", "SmolLM2", refused="too big"),
    ]
    table = serving_table({"versions": {"vllm": {"vLLM": "0.32.0"}}, "rows": rows}).splitlines()
    assert "| vLLM 0.32.0 | llama.cpp by node-llama-cpp |" in table[0]
    assert table[2] == "| SmolLM2 | `merged` | - | 1e-03, refused | - | - |"
    assert table[3] == "| tiny x | the DoRA adapter itself | - | refused | - | - |"
    assert table[4] == "| tiny x | `lora` of rank 128 | - | 2e-06, 5e-02 | - | taken |"
    assert len(table) == 5
    assert ENGINES.keys() == set(check_serving.ENGINES)
    assert serving_table({}) == UNMEASURED
