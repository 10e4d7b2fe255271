"""torchtune itself: logits with the adapter that was written, and adapters of its own, as it trains and exports them.

python scripts/engine_torchtune.py FOLDER  # as scripts/check_formats.py made it
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torchtune.models.convert_weights import hf_to_tune, tune_to_peft_adapter_config, tune_to_peft_adapter_weights
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import DoRALinear

ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]


def model(folder: Path, rank: int, alpha: float) -> torch.nn.Module:
    """The base with DoRA layers on all linear ones of its blocks, magnitudes as initialised."""
    config = json.loads((folder / "llama" / "config.json").read_text())
    heads = {"num_heads": config["num_attention_heads"], "num_kv_heads": config["num_key_value_heads"]}
    made = lora_llama3(
        ATTENTION, True, False, vocab_size=config["vocab_size"], num_layers=config["num_hidden_layers"], **heads,
        embed_dim=config["hidden_size"], max_seq_len=64, intermediate_dim=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"], rope_base=config["rope_parameters"]["rope_theta"], lora_rank=rank,
        lora_alpha=alpha, use_dora=True,
    )  # fmt: skip
    weights = load_file(folder / "llama" / "model.safetensors")
    own = hf_to_tune(weights, **heads, dim=config["hidden_size"], head_dim=config["head_dim"])
    found = made.load_state_dict(own, strict=False)
    assert not found.unexpected_keys
    for layer in made.modules():
        if isinstance(layer, DoRALinear):
            layer.initialize_dora_magnitude()
    return made.eval()


def logits(made: torch.nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"logits": made(torch.arange(10)[None]).contiguous()}


def main() -> None:
    folder = Path(sys.argv[1])
    config = json.loads((folder / "torchtune" / "adapter_config.json").read_text())
    made = model(folder, config["r"], config["lora_alpha"])
    found = made.load_state_dict(load_file(folder / "torchtune" / "adapter_model.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if "lora" in key or "magnitude" in key]
    save_file(logits(made), folder / "torchtune_read.safetensors")

    made = model(folder, 3, 5.0)
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    for layer in made.modules():
        if isinstance(layer, DoRALinear):
            layer.initialize_dora_magnitude()
            layer.magnitude.data *= 1 + 0.1 * torch.randn(layer.magnitude.shape)
    save_file(logits(made), folder / "torchtune_made.safetensors")
    state = {key: t for key, t in made.state_dict().items() if "lora" in key or "magnitude" in key}
    own = folder / "torchtune_made"
    own.mkdir()
    save_file(state, own / "adapter_model.safetensors")
    (own / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 5}))

    base = json.loads((folder / "llama" / "config.json").read_text())
    sizes = {"num_heads": base["num_attention_heads"], "num_kv_heads": base["num_key_value_heads"]}
    exported = folder / "torchtune_exported"
    exported.mkdir()
    tensors = tune_to_peft_adapter_weights(state, **sizes, dim=base["hidden_size"], head_dim=base["head_dim"])
    save_file({key: t.contiguous() for key, t in tensors.items()}, exported / "adapter_model.safetensors")
    entries = tune_to_peft_adapter_config({"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj", "v_proj"]})
    (exported / "adapter_config.json").write_text(json.dumps(entries))
    (folder / "torchtune.json").write_text(json.dumps({"torchtune": importlib.metadata.version("torchtune")}))


if __name__ == "__main__":
    main()
