"""QDoRA against QLoRA: time and peak memory of a training step over a base in nf4.

    python scripts/benchmark_qdora.py                                        # a LLaMA of 70B shapes, on a GPU of 80 GB
    python scripts/benchmark_qdora.py --device cpu --hidden 64 --layers 2    # a toy, in seconds

The base is made of random 4-bit codes, layer by layer, so that no dense copy of it ever exists; both adapters share it.
Checkpointing is on, as in practice. A step is zero_grad, forward, backward, AdamW. Expected result: medians of
interleaved rounds and ratios to QLoRA, the same in scripts/benchmarks/results/qdora_DEVICE.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import enable_checkpointing
from benchmarks.report import RESULTS
from common.arguments import positive
from common.files import write_json
from common.machine import describe_machine
from common.memory import PeakMemory
from dora_peft import DoraConfig


def quantized(linear: nn.Linear, device: torch.device) -> nn.Module:
    """An nf4 layer of this shape with random weights."""
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    dense = torch.randn(linear.out_features, linear.in_features, device=device, dtype=torch.bfloat16)
    dense *= linear.in_features**-0.5
    packed, state = bnb.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=device.type == "cuda")
    layer.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
    )
    layer.quant_state = state
    return layer


def build(options: argparse.Namespace) -> Any:
    hidden = options.hidden
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=hidden // 128 if hidden >= 1024 else 4,
        num_key_value_heads=8 if hidden >= 1024 else 2,
        vocab_size=options.vocab,
        max_position_embeddings=8192,
        pad_token_id=None,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, quantized(child, options.device))
    for module in model.modules():
        # what is left: embeddings, norms, rotary frequencies
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.randn(parameter.shape, device=options.device, dtype=parameter.dtype) * 0.02
                module._parameters[name] = nn.Parameter(value if value.dim() > 1 else torch.ones_like(value))
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary.to(options.device)
    return model.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=positive, default=8192)
    parser.add_argument("--layers", type=positive, default=80)
    parser.add_argument("--vocab", type=positive, default=32000)
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = build(options)
    arguments: dict[str, Any] = {"r": options.rank, "lora_alpha": 2 * options.rank, "target_modules": "all-linear"}
    # one model with both adapters at a time would need both kinds of layers: they take turns over the same base
    ids = torch.randint(options.vocab, (1, options.tokens), device=options.device)
    results: dict[str, dict[str, list[float]]] = {name: {"time_ms": [], "peak_mib": []} for name in ("qlora", "qdora")}
    losses: dict[str, float] = {}
    for number in range(options.rounds + 1):
        for name in results:
            config = LoraConfig(**arguments) if name == "qlora" else DoraConfig(**arguments)
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
            adapted.enable_input_require_grads()
            enable_checkpointing(adapted)
            adapted.train()
            optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
            for timed in (False, True):
                memory = PeakMemory(options.device)
                memory.start()
                begin = now(options.device)
                optimizer.zero_grad()
                loss = adapted(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                seconds = now(options.device) - begin
                memory.stop()
                if not timed:
                    losses.setdefault(name, loss.item())
                elif number:
                    results[name]["time_ms"].append(1000 * seconds)
                    results[name]["peak_mib"].append(memory.peak_bytes / 2**20)
            del optimizer, loss
            model = adapted.unload()
            del adapted
    if abs(losses["qlora"] - losses["qdora"]) > 0.01 * abs(losses["qlora"]):
        raise SystemExit(f"at the first step, where both are the base model, the losses differ: {losses}")
    medians = {name: {key: statistics.median(v) for key, v in values.items()} for name, values in results.items()}
    for name, found in medians.items():
        ratios = {key: value / medians["qlora"][key] for key, value in found.items()}
        print(f"{name}: {found['time_ms']:.0f} ms ({ratios['time_ms']:.3f}), {found['peak_mib']:.0f} MiB", end=" ")
        print(f"({ratios['peak_mib']:.3f})")
    path = options.results / f"qdora_{options.device.type}.json"
    setting = {name: getattr(options, name) for name in ("hidden", "layers", "vocab", "tokens", "rank", "rounds")}
    write_json(path, {**describe_machine(options.device), "setting": setting, "qdora": results})
    print(f"wrote {path}")


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
