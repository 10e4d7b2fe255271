"""mlx-lm itself: outputs of the folder that was written, and a DoRA of its own.

python scripts/engine_mlx.py FOLDER        # as scripts/check_formats.py made it
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model


def outputs(model, inputs):
    """Of each linear layer by itself."""
    modules = dict(model.named_modules())
    return {path: modules[path](x) for path, x in inputs.items()}


def main() -> None:
    folder = Path(sys.argv[1])
    inputs = mx.load(str(folder / "inputs.safetensors"))
    model, _ = load_model(folder / "llama")
    model = load_adapters(model, str(folder / "mlx"))
    model.eval()
    mx.save_safetensors(str(folder / "mlx_read.safetensors"), outputs(model, inputs))

    model, _ = load_model(folder / "llama")
    model.freeze()
    keys = sorted({path.split(".", 3)[3] for path in inputs})
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, -1, parameters, use_dora=True)
    mx.random.seed(0)
    changed = []
    for name, value in tree_flatten(model.trainable_parameters()):
        noise = mx.random.normal(value.shape)
        changed.append((name, value * (1 + 0.1 * noise) if name.endswith(".m") else 0.3 * noise))
    model.load_weights(changed, strict=False)
    model.eval()
    made = folder / "mlx_made"
    made.mkdir()
    mx.save_safetensors(str(made / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": "dora", "num_layers": -1, "lora_parameters": parameters}
    (made / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "mlx_made.safetensors"), outputs(model, inputs))
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
    (folder / "mlx.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main()
