"""LyCORIS itself: outputs of the file that was written, and a DoRA of its own with norms per output row.

python scripts/engine_lycoris.py FOLDER    # as scripts/check_formats.py made it
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from lycoris import create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file, save_file

from engines.tree import model, outputs


def main() -> None:
    folder = Path(sys.argv[1])
    inputs = load_file(folder / "inputs.safetensors")
    root = model(folder)
    network, _ = create_lycoris_from_weights(1.0, str(folder / "lycoris" / "adapter_model.safetensors"), root)
    network.apply_to()
    save_file(outputs(root, inputs), folder / "lycoris_read.safetensors")

    root = model(folder)
    options = {"multiplier": 1.0, "linear_dim": 3, "linear_alpha": 5, "algo": "lora", "dora_wd": True}
    network = create_lycoris(root, **options, wd_on_output=True)
    network.apply_to()
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape)
        parameter.data = parameter.data * (1 + 0.1 * noise) if "dora" in name else 0.3 * noise
    (folder / "lycoris_made").mkdir()
    state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    save_file(state, folder / "lycoris_made" / "adapter_model.safetensors")
    save_file(outputs(root, inputs), folder / "lycoris_made.safetensors")
    (folder / "lycoris.json").write_text(json.dumps({"lycoris-lora": importlib.metadata.version("lycoris-lora")}))


if __name__ == "__main__":
    main()
