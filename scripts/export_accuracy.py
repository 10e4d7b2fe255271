"""What each route out of a DoRA adapter leaves of its accuracy: words pronounced rightly after `dora-peft export`.

    python scripts/prepare_smollm2.py --safetensors outputs/smollm2
    python scripts/export_accuracy.py --base outputs/smollm2 --adapter outputs/demo/dora

with the adapter of scripts/demo.sh. Runs on a CPU in about 20 minutes on 2 cores; `--words 8` is a short run. Expected
result: a line for each route, dtype and rank with the share of held-out words that are right, how many answers are
those of the DoRA model, and error / update over all weights; stored in scripts/engines/spelling.json, which README's
table comes from. All models compute in fp32 with the weights as they were written, so that only what an export
rounded or left out makes a difference.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from common.files import write_json
from common.machine import describe_machine
from common.spelling import read_records, score
from common.spelling_table import spelling_table
from dora_peft.adapters.export import Record, export
from finetune.generation import generate_answers, load_model

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RANKS = (8, 32, 128, 512)


@dataclass(frozen=True)
class Case:
    """One export: its route and what is asked for."""

    route: str
    dtype: str
    rank: int | None = None
    weighted: bool = False


def cases() -> Iterator[Case]:
    for route in ("exact", "merged"):
        for dtype in DTYPES:
            yield Case(route, dtype)
    for rank in RANKS:
        for dtype in DTYPES if rank == 32 else ("fp16",):
            yield Case("lora", dtype, rank)
    yield Case("lora", "fp16", 32, weighted=True)


def answers_of(base: Path, adapter: Path | None, prompts: Sequence[str]) -> list[str]:
    model, tokenizer = load_model(str(base), None, None if adapter is None else str(adapter))
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return generate_answers(model.float(), tokenizer, list(prompts), 100, 20)


def exported(case: Case, options: argparse.Namespace, out: Path, text: Path) -> tuple[Record, Path, Path | None]:
    """The record of an export, and the base and adapter to load."""
    record = export(
        options.adapter, options.base, out, case.route, dtype=DTYPES[case.dtype], rank=case.rank,
        calibration=text if case.weighted else None, base_quantization="none",
    )  # fmt: skip
    if case.route == "exact":
        return record, out / "base", out / "adapter"
    return (record, out, None) if case.route == "merged" else (record, options.base, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the base in safetensors")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, default=Path("data/cmudict"), help="with train.jsonl and test.jsonl")
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--calibration_words", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=Path("scripts/engines"))
    options = parser.parse_args(argv)
    records = read_records(options.dataset / "test.jsonl", options.words)
    prompts, completions = ([record[name] for record in records] for name in ("prompt", "completion"))
    told = answers_of(options.base, options.adapter, prompts)
    rows = [{"route": "dora", "dtype": "fp32", **score(told, completions), "same_answers": 1.0}]
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "calibration.txt"
        lines = read_records(options.dataset / "train.jsonl", options.calibration_words)
        text.write_text("\n".join(line["prompt"] + line["completion"] for line in lines), encoding="utf-8")
        for number, case in enumerate(cases()):
            record, base, adapter = exported(case, options, Path(scratch) / str(number), text)
            found = answers_of(base, adapter, prompts)
            same = sum(one == other for one, other in zip(found, told, strict=True)) / len(told)
            rows.append({**vars(case), **score(found, completions), "same_answers": same, "totals": record.totals})
            print(spelling_table(rows[-1:]).splitlines()[-1], flush=True)
    machine = describe_machine(torch.device("cpu"))
    write_json(options.results / "spelling.json", {"machine": machine, "words": len(records), "rows": rows})
    print(spelling_table(rows))


if __name__ == "__main__":
    main()
