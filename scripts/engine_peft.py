"""PEFT itself, without this package: outputs of the folder that was written, and a use_dora adapter of its own.

python scripts/engine_peft.py FOLDER       # as scripts/check_formats.py made it
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from engines.tree import model, outputs


def main() -> None:
    folder = Path(sys.argv[1])
    inputs = load_file(folder / "inputs.safetensors")
    root = PeftModel.from_pretrained(model(folder), folder / "peft").eval().base_model.model
    save_file(outputs(root, inputs), folder / "peft_read.safetensors")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=list(inputs), use_dora=True, init_lora_weights=False)
    made = get_peft_model(model(folder), config).eval()
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape)
    made.save_pretrained(folder / "peft_made")
    save_file(outputs(made.base_model.model, inputs), folder / "peft_made.safetensors")
    (folder / "peft.json").write_text(json.dumps({"peft": importlib.metadata.version("peft")}))


if __name__ == "__main__":
    main()
