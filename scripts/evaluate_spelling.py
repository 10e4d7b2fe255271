"""Measure how many held-out words a model pronounces rightly from their spelling, with or without an adapter.

    python scripts/evaluate_spelling.py --model_name_or_path data/smollm2 \\
        --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --dataset data/cmudict/test.jsonl --limit 200 \\
        --adapter outputs/demo/dora --json outputs/demo/dora.json

Runs on a GPU if there is one, and as it stands on the CPU: 200 words take about half a minute on 2 cores. Expected
result: a line such as `dora  exact match 20.0 %  phoneme error rate 33.0 %  (200 words)`; without `--adapter` no word
is right. Answers are generated greedily, so that the figures repeat. The model sees the records' prompts as they stand,
the very text that `finetune_llama.py` trains on.
"""

import argparse
import json
from pathlib import Path

from common.spelling import read_records, score
from finetune.generation import generate_answers, load_model


def format_row(result: dict[str, str | int | float]) -> str:
    """One line of the results."""
    return (
        f"{result['name']:<20} exact match {result['exact_match']:6.1%}   "
        f"phoneme error rate {result['phoneme_error_rate']:7.1%}   ({result['words']} words)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--gguf_file")
    parser.add_argument("--adapter", help="folder or Hub id; without it the model itself is measured")
    parser.add_argument("--dataset", type=Path, default=Path("data/cmudict/test.jsonl"))
    parser.add_argument("--limit", type=int, help="take the first words only")
    parser.add_argument("--batch_size", type=int, default=50)
    # Words of 9 letters have at most 16 tokens of phonemes; a model that does not stop is cut here.
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the result and every answer to this file")
    args = parser.parse_args()

    records = read_records(args.dataset, args.limit)
    model, tokenizer = load_model(args.model_name_or_path, args.gguf_file, args.adapter)
    prompts = [record["prompt"] for record in records]
    completions = [record["completion"] for record in records]
    answers = generate_answers(model, tokenizer, prompts, args.batch_size, args.max_new_tokens)

    name = Path(args.adapter).name if args.adapter else "without adapter"
    result = {"name": name, "words": len(records), **score(answers, completions)}
    for prompt, completion, answer in list(zip(prompts, completions, answers, strict=True))[:5]:
        print(f"  {prompt}  expected{completion!s:<24}  found {' '.join(answer.split())}")
    print(format_row(result))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"prompt": prompt, "expected": completion, "found": answer}
            for prompt, completion, answer in zip(prompts, completions, answers, strict=True)
        ]
        args.json.write_text(json.dumps({**result, "answers": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
