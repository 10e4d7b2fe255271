"""vLLM itself, on a CPU: answers of each form of an adapter, or what it says when it refuses one.

python scripts/engine_vllm.py FOLDER      # as scripts/check_serving.py made it
"""

import gc
import importlib.metadata
import json
import os
import sys
from itertools import groupby
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# The engine in this process: its errors are raised here, and no process is left behind.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# What vLLM takes as its largest rank (vllm/config/lora.py).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def rank_of(adapter: Path) -> int:
    """The least of vLLM's ranks that holds the adapter's; a DoRA adapter may have any."""
    rank = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    return min(allowed for allowed in RANKS if allowed >= rank)


def ask(llm: LLM, prompt: list[int], new: int, lora: LoRARequest | None) -> dict:
    """Log-probabilities of the prompt's tokens but the first, and greedy tokens."""
    options = SamplingParams(temperature=0, max_tokens=new, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], options, lora_request=lora, use_tqdm=False)
    given = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    return {
        "logprobs": [entry[token].logprob for token, entry in given],
        "tokens": list(output.outputs[0].token_ids),
    }


def serve(folder: Path, models: dict, group: list[tuple[str, dict]]) -> dict[str, dict]:
    """The answers to cases that share a base and a dtype, and so one engine."""
    adapters = [folder / case["adapter"] for _, case in group if case["adapter"] is not None]
    lora = {"enable_lora": True, "max_lora_rank": max(map(rank_of, adapters))} if adapters else {}
    first, rows = group[0][1], {}
    try:
        llm = LLM(
            str(folder / first["base"]), dtype=DTYPES[first["dtype"]], enforce_eager=True, skip_tokenizer_init=True,
            max_model_len=128, max_num_seqs=2, enable_prefix_caching=False, **lora,
        )  # fmt: skip
    except Exception as error:
        return {name: {"refused": str(error).strip().splitlines()[0]} for name, _ in group}
    for number, (name, case) in enumerate(group, 1):
        about, request = models[case["model"]], None
        if case["adapter"] is not None:
            request = LoRARequest(name, number, str(folder / case["adapter"]))
        try:
            rows[name] = ask(llm, about["prompt"], about["new"], request)
        except Exception as error:
            rows[name] = {"refused": str(error).strip().splitlines()[0]}
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return rows


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    plan = json.loads((folder / "cases.json").read_text(encoding="utf-8"))

    def engine(item: tuple[str, dict]) -> tuple[str, str, bool]:
        # The DoRA adapter has an engine of its own: what it does to one cannot change what another form gives.
        return item[1]["base"], item[1]["dtype"], item[1]["route"] == "dora"

    cases = [(name, case) for name, case in plan["cases"].items() if "vllm" in case["engines"]]
    rows = {}
    for _, group in groupby(sorted(cases, key=engine), key=engine):
        rows |= serve(folder, plan["models"], list(group))
    versions = {"vLLM": importlib.metadata.version("vllm-cpu")}
    (folder / "vllm.json").write_text(json.dumps({"versions": versions, "rows": rows}))


if __name__ == "__main__":
    main()
