"""Check that a saved adapter gives the same outputs in plain PEFT, in an environment that does not have `dora_peft`.

In an environment with `dora_peft`, store reference logits; then compare in one with only torch, transformers and PEFT
(and gguf for a GGUF model):

    python scripts/check_interchange.py --write outputs/reference.safetensors --adapter outputs/demo/dora \\
        --model_name_or_path data/smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf
    other/bin/python scripts/check_interchange.py --check outputs/reference.safetensors --adapter outputs/demo/dora \\
        --model_name_or_path data/smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf

Runs on the CPU, in float32. Expected result of the second: the greatest differences of the logits, for the model with
the adapter and as a control without, then `ok`; `FAIL` and exit status 1 if they differ.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["Say w i n d o w:", "The capital of France is", "def add(a, b):\n    return"]


@torch.inference_mode()
def compute_logits(args: argparse.Namespace, token_ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of the model with and without the adapter.

    Returns:
        For every text i `adapter.i` and `base.i`, both [length, vocabulary] in float32.
    """
    base = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path, gguf_file=args.gguf_file, dtype=torch.float32
    ).eval()
    logits = {f"base.{i}": base(ids[None]).logits[0] for i, ids in enumerate(token_ids)}
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    logits |= {f"adapter.{i}": model(ids[None]).logits[0] for i, ids in enumerate(token_ids)}
    return logits


def write(args: argparse.Namespace) -> None:
    """Store token ids and logits, computed with `dora_peft`."""
    import dora_peft  # noqa: F401 - makes PEFT load the adapter as this package's own

    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, gguf_file=args.gguf_file)
    token_ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    tensors = compute_logits(args, token_ids) | {f"token_ids.{i}": ids for i, ids in enumerate(token_ids)}
    args.write.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.write)
    print(f"wrote {args.write}: logits of {len(TEXTS)} texts")


def check(args: argparse.Namespace) -> bool:
    """Compare the stored logits with those that plain PEFT computes, and say whether they agree."""
    if importlib.util.find_spec("dora_peft") is not None:
        raise SystemExit("--check must run where dora_peft cannot be imported: it is about plain PEFT")
    stored = load_file(args.check)
    token_ids = [stored[f"token_ids.{i}"] for i in range(len(TEXTS))]
    found = compute_logits(args, token_ids)
    difference = {
        kind: max((found[f"{kind}.{i}"] - stored[f"{kind}.{i}"]).abs().max().item() for i in range(len(TEXTS)))
        for kind in ("base", "adapter")
    }
    # Logits that the adapter does not move would agree whether it is loaded rightly or not at all.
    effect = max((stored[f"adapter.{i}"] - stored[f"base.{i}"]).abs().max().item() for i in range(len(TEXTS)))
    print(f"without adapter: largest difference {difference['base']:.2e}")
    print(f"with adapter:    largest difference {difference['adapter']:.2e} (the adapter moves logits by {effect:.2e})")
    return max(difference.values()) <= args.tolerance < effect


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", type=Path, metavar="FILE")
    mode.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--gguf_file")
    parser.add_argument("--adapter", required=True, help="folder or Hub id")
    # float32 logits of SmolLM2 lie near 20; reordered sums move them by some 1e-5.
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest allowed difference of a logit")
    args = parser.parse_args()

    if args.write is not None:
        write(args)
        return
    agrees = check(args)
    print("ok" if agrees else "FAIL")
    sys.exit(not agrees)


if __name__ == "__main__":
    main()
