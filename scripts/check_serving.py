"""What servers make of each form in which `dora-peft export` writes an adapter.

    bash scripts/engines.sh serve                     # makes the environments and runs all of it

    python scripts/check_serving.py make FOLDER       # tiny models with DoRA adapters, and each export of them
    python scripts/check_serving.py make FOLDER --adapter outputs/demo/dora    # an adapter of yours, too
    python scripts/engine_vllm.py FOLDER             # in the engine's environment: what it answers, or refuses
    python scripts/check_serving.py compare FOLDER    # the table

Expected result of `compare`: for each engine, form and dtype the largest difference of the log-probabilities of a
prompt's tokens from those of our model with its DoRA adapter in fp32, divided by what the adapter does to them (1 is as
wrong as no adapter at all); and how many greedy tokens agree. It is stored as serving.json in --results, which README's
table comes from. Exit status 1 if an engine refuses what we wrote, or answers something else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from common.files import write_json
from common.machine import describe_machine
from common.serving_table import serving_table
from dora_peft import DoraConfig
from dora_peft.adapters.export import export
from engines.served import answers

ENGINES = ("transformers", "vllm", "llama", "sglang")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Error / what the adapter does. 16 bits lose what they lose in the layers' outputs too, so these only tell a right
# answer from a wrong one; the errors themselves stand in the table. At a rank below the matrices' own, `lora` is an
# approximation: then it has to be nearer than the base alone.
BOUNDS = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.3}
APPROXIMATE = 1.0
# The least sizes that all engines take: vLLM's attention on a CPU has heads of 32 and more.
SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {
    "tiny LLaMA": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "tiny Qwen2 with biases": Qwen2Config(**SIZES, tie_word_embeddings=True),
}
# Where a server finds the base and the adapter of each route.
SERVED: dict[str, Callable[[str, str], dict[str, str | None]]] = {
    "exact": lambda out, base: {"base": f"{out}/base", "adapter": f"{out}/adapter"},
    "lora": lambda out, base: {"base": base, "adapter": out},
    "merged": lambda out, base: {"base": out, "adapter": None},
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = "Say g a l l o p i n g: G AE L AH P IH NG\nSay t r o m b o n e s:"
NEW = 16


def make_tokenizer(folder: Path) -> None:
    """A small SentencePiece model of this file's text: llama.cpp's converter wants one that it knows by its kind."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text(encoding="utf-8").splitlines()),
        model_prefix=str(folder / "tokenizer"), vocab_size=360, model_type="bpe", byte_fallback=True, pad_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()


def make_tiny(config: PretrainedConfig, folder: Path) -> None:
    """A random model in `folder`/base, and a DoRA adapter of it as if it were trained in `folder`/dora."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder / "base")
    make_tokenizer(folder / "base")
    model.name_or_path = str(folder / "base")
    adapted = get_peft_model(model, DoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
        elif "lora_magnitude" in name:
            parameter.data *= 1 + 0.03 * torch.randn(parameter.shape)
    adapted.save_pretrained(folder / "dora")


def dense_base(base: str) -> tuple[PreTrainedModel, Any]:
    """The float model of a folder, or of the one GGUF file in it, with its tokenizer."""
    files = [] if (Path(base) / "config.json").is_file() else sorted(Path(base).glob("*.gguf"))
    options: dict[str, Any] = {"gguf_file": files[0].name} if files else {}
    tokenizer = AutoTokenizer.from_pretrained(base, **options)
    if files and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options), tokenizer


def make_given(folder: Path, adapter: Path, base: str | None) -> dict[str, Any]:
    """The user's adapter, with its base as a folder of floats; what a case needs to know of it."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    model, tokenizer = dense_base(base or config["base_model_name_or_path"])
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    PeftModel.from_pretrained(model, adapter).save_pretrained(folder / "dora")
    return {"prompt": tokenizer(PROMPT)["input_ids"], "new": NEW, "modules": LINEAR}


def make_forms(folder: Path, name: str, rank: int, whole: bool) -> dict[str, dict[str, Any]]:
    """Every export of `folder`/`name`/dora, and its cases by their names."""
    base, dora = f"{name}/base", f"{name}/dora"
    cases: dict[str, dict[str, Any]] = {}
    about: dict[str, Any]
    for dtype in DTYPES:
        # What these refuse does not depend on the dtype.
        engines = list(ENGINES) if dtype == "fp32" else ["transformers"]
        about = {"route": "dora", "dtype": dtype, "base": base, "adapter": dora, "engines": engines}
        cases[f"{name} dora {dtype}"] = about
    for route in ("exact", "lora", "merged"):
        for dtype in DTYPES:
            out = f"{name}/{route}-{dtype}"
            options: dict[str, Any] = {"rank": rank} if route == "lora" else {}
            record = export(folder / dora, folder / base, folder / out, route, dtype=DTYPES[dtype], **options)
            about = {"route": route, "dtype": dtype, **SERVED[route](out, base), "engines": list(ENGINES)}
            about["weights"] = record.totals["error_over_update"]
            if route == "lora":
                about |= {"rank": rank, "approximate": not whole}
                gguf = f"{out}.gguf"
                export(folder / dora, folder / base, folder / gguf, route, dtype=DTYPES[dtype], to="gguf", **options)
                cases[f"{name} gguf {dtype}"] = {**about, "route": "gguf", "adapter": gguf, "engines": ["llama"]}
            if route == "merged":
                # It checks adapters alone, and here is none.
                about["engines"].remove("sglang")
            cases[f"{name} {route} {dtype}"] = about
    return {case: {"model": name, **about} for case, about in cases.items()}


def make(folder: Path, adapter: Path | None, base: str | None, rank: int) -> None:
    """The models, their adapters, every export of them, and the plan that the engines read."""
    models: dict[str, dict[str, Any]] = {}
    cases: dict[str, dict[str, Any]] = {}
    for name, config in MODELS.items():
        make_tiny(config, folder / name)
        prompt = torch.randint(3, 360, (24,), generator=torch.Generator().manual_seed(0)).tolist()
        models[name] = {"prompt": prompt, "new": NEW, "modules": LINEAR}
        # No matrix of theirs has a larger rank, so `lora` is exact too.
        cases |= make_forms(folder, name, SIZES["hidden_size"], whole=True)
    if adapter is not None:
        models["given"] = make_given(folder / "given", adapter, base)
        cases |= make_forms(folder, "given", rank, whole=False)
    write_json(folder / "cases.json", {"models": models, "cases": cases})


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of two lists of log-probabilities."""
    if len(one) != len(other):
        raise SystemExit(f"error: {len(one)} log-probabilities instead of {len(other)}")
    # NaN is an error too, which max() would pass over.
    return torch.tensor(one, dtype=torch.float64).sub(torch.tensor(other, dtype=torch.float64)).abs().max().item()


def truths(folder: Path, plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The answers of each model with its DoRA adapter in fp32, and what the adapter does to them."""
    found = {}
    for name, about in plan["models"].items():
        model = AutoModelForCausalLM.from_pretrained(folder / name / "base", dtype=torch.float32)
        adapted = PeftModel.from_pretrained(model, folder / name / "dora").eval()
        truth = answers(adapted, about["prompt"], about["new"])
        with adapted.disable_adapter():
            alone = answers(adapted, about["prompt"], 0)
        found[name] = {**truth, "update": difference(truth["logprobs"], alone["logprobs"])}
    return found


def judge(row: Mapping[str, Any], case: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored of one answer of one engine; `right` is whether it is what had to be expected."""
    kept = {key: case[key] for key in ("model", "route", "dtype", "rank", "weights") if key in case}
    if "refused" in row:
        return {**kept, "refused": row["refused"], "right": case["route"] == "dora"}
    if "scaling" in row:
        return {**kept, "scaling": row["scaling"], "right": row["scaling"] == 1.0}
    error = difference(row["logprobs"], truth["logprobs"]) / truth["update"]
    pairs = list(zip(row["tokens"], truth["tokens"], strict=True))
    equal = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
    approximate = case.get("approximate", False)
    right = error <= (APPROXIMATE if approximate else BOUNDS[case["dtype"]])
    if case["dtype"] == "fp32" and not approximate:
        right = right and equal == len(pairs)
    return {**kept, "error": error, "greedy": equal, "of": len(pairs), "right": right}


def compare(folder: Path, results: Path, label: str) -> bool:
    """Store and print what the engines gave; whether all is as it should be."""
    plan = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    path = results / "serving.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"versions": {}, "rows": []}
    found = truths(folder, plan)
    names = {name: label if name == "given" else name for name in plan["models"]}
    fresh: list[dict[str, Any]] = []
    for engine in ENGINES:
        if not (folder / f"{engine}.json").is_file():
            continue
        given = json.loads((folder / f"{engine}.json").read_text(encoding="utf-8"))
        wanted = {name for name, case in plan["cases"].items() if engine in case["engines"]}
        if given["rows"].keys() != wanted:
            raise SystemExit(f"error: answers of {engine} to {sorted(given['rows'].keys() ^ wanted)[:3]} are missing")
        stored["versions"][engine] = given["versions"]
        for name in sorted(wanted):
            case = plan["cases"][name]
            row = judge(given["rows"][name], case, found[case["model"]])
            fresh.append({"engine": engine, **row, "model": names[case["model"]]})
    seen = {(row["engine"], row["model"]) for row in fresh}
    kept = [row for row in stored["rows"] if (row["engine"], row["model"]) not in seen]
    updates = {names[name]: truth["update"] for name, truth in found.items()}
    report = {
        "machine": describe_machine(torch.device("cpu")),
        "bounds": BOUNDS,
        "updates": {**stored.get("updates", {}), **updates},
        "versions": stored["versions"],
        "rows": kept + fresh,
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    print(serving_table(report))
    for row in fresh:
        if not row["right"]:
            print(f"error: {row}", file=sys.stderr)
    return all(row["right"] for row in fresh)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapter", type=Path, help="make: a DoRA adapter of LLaMA's modules, besides the tiny ones")
    parser.add_argument("--base", help="make: its base, if it is not the one that the adapter names")
    parser.add_argument("--rank", type=int, default=128, help="make: of its `lora` export (default 128)")
    parser.add_argument("--label", default="SmolLM2-135M", help="compare: what --adapter was")
    parser.add_argument("--results", type=Path, default=Path("scripts/engines"))
    options = parser.parse_args(argv)
    if options.what == "make":
        make(options.folder, options.adapter, options.base, options.rank)
    elif not compare(options.folder, options.results, options.label):
        sys.exit(1)


if __name__ == "__main__":
    main()
