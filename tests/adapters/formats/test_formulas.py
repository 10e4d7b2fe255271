"""What each format's readers compute, restated from its description, is W' of the adapter that was written."""

import pytest
import torch
from format_fixtures import HEADS, adapter, base_for, effective, weights

from dora_peft.adapters.formats import FORMATS, Base

PREFIX = "base_model.model."


def rows(matrix):
    return torch.linalg.vector_norm(matrix, dim=1, keepdim=True)


def normed(weight, change, m):
    """m (W0 + change) / ||W0 + change|| per row."""
    return (weight + change) * (m.reshape(-1, 1) / rows(weight + change))


def peft(files, path, weight):
    config = files.json["adapter_config.json"]
    t, s = files.tensors, config["lora_alpha"] / config["r"]
    key = f"{PREFIX}{path}"
    m = t[f"{key}.lora_magnitude_vector.weight"]
    return normed(weight, s * t[f"{key}.lora_B.weight"] @ t[f"{key}.lora_A.weight"], m)


def nvlabs(files, path, weight):
    config = files.json["adapter_config.json"]
    t, s = files.tensors, config["lora_alpha"] / config["r"]
    key = f"{PREFIX}{path}"
    m = t[f"{key}.weight_m_wdecomp.weight"]
    assert m.shape == (len(weight), 1)
    return normed(weight, s * t[f"{key}.lora_B.weight"] @ t[f"{key}.lora_A.weight"], m)


def trtllm(files, path, weight):
    """The engine scales rows of x W0^T + s x A^T B^T by the stored vector."""
    config = files.json["adapter_config.json"]
    t, s = files.tensors, config["lora_alpha"] / config["r"]
    key = f"{PREFIX}{path}"
    change = s * t[f"{key}.lora_B.weight"] @ t[f"{key}.lora_A.weight"]
    return (weight + change) * t[f"{key}.lora_magnitude_vector"].reshape(-1, 1)


def lycoris(files, path, weight, prefix="lycoris"):
    t, name = files.tensors, f"{prefix}_{path.replace('.', '_')}"
    down, up = t[f"{name}.lora_down.weight"], t[f"{name}.lora_up.weight"]
    assert t[f"{name}.dora_scale"].shape == (len(weight), 1)
    return normed(weight, up @ down * (t[f"{name}.alpha"] / len(down)), t[f"{name}.dora_scale"])


def onetrainer(files, path, weight):
    return lycoris(files, path, weight, "lora_unet")


def comfyui(files, path, weight):
    """It divides by ||W0||."""
    t, name = files.tensors, f"lora_unet_{path.replace('.', '_')}"
    down, up = t[f"{name}.lora_down.weight"], t[f"{name}.lora_up.weight"]
    return (weight + up @ down * (t[f"{name}.alpha"] / len(down))) * (t[f"{name}.dora_scale"] / rows(weight))


def ai_toolkit(files, path, weight):
    t = files.tensors
    return normed(weight, t[f"{path}.lora_B.weight"] @ t[f"{path}.lora_A.weight"], t[f"{path}.magnitude"])


def mlx(files, path, weight):
    t, scale = files.tensors, files.json["adapter_config.json"]["lora_parameters"]["scale"]
    return normed(weight, scale * t[f"{path}.lora_b"].T @ t[f"{path}.lora_a"].T, t[f"{path}.m"])


def torchtune(files, path, weight):
    """Computed with W0 in torchtune's own order, and brought back."""
    names = {"self_attn.": "attn.", "o_proj": "output_proj", "mlp.down_proj": "mlp.w2"}
    own = path.removeprefix("model.")
    for theirs, ours in names.items():
        own = own.replace(theirs, ours)
    t, config = files.tensors, files.json["adapter_config.json"]
    heads = {"q_proj": HEADS["num_attention_heads"], "k_proj": HEADS["num_key_value_heads"]}.get(own.split(".")[-1])
    order = torch.arange(len(weight))
    if heads:
        # row 2 i of a head is row i here, and row 2 i + 1 is row i + half
        order = order.view(heads, 2, -1).transpose(1, 2).flatten()
    s = config["lora_alpha"] / config["r"]
    made = normed(weight[order], s * t[f"{own}.lora_b.weight"] @ t[f"{own}.lora_a.weight"], t[f"{own}.magnitude"])
    out = torch.empty_like(made)
    out[order] = made
    return out


READERS = {
    "peft": peft, "nvlabs": nvlabs, "trtllm": trtllm, "lycoris": lycoris, "onetrainer": onetrainer,
    "comfyui-2026": comfyui, "ai-toolkit": ai_toolkit, "mlx": mlx, "torchtune": torchtune,
}  # fmt: skip


def test_there_is_a_reader_of_each_format():
    assert READERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_readers_get_the_same_weight(name):
    made = adapter(11, 3, 2.0)
    model = base_for(made)
    files, stored = FORMATS[name].write(made, Base(model)), weights(model)
    for path, one in made.modules.items():
        found = READERS[name](files, path, stored[path])
        torch.testing.assert_close(found.double(), effective(stored[path], one), rtol=1e-5, atol=1e-5)
