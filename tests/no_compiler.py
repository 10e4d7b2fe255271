"""A model on a GPU in a container without a C compiler, which Triton needs to launch anything: as far as it goes here.

Run by tests/whole/test_no_compiler.py in another process, since a process either interprets Triton's kernels or
compiles them. torch says that there is a GPU, and what is asked about the CPU, where the tensors lie, is asked about
that GPU; kernels, their check and Triton are what they are, so that its driver looks for a compiler and finds none.
Prints a JSON object.
"""

import json
import warnings
from unittest import mock

import torch
from peft import get_peft_model

import dora_peft
from dora_peft import DoraConfig, reference
from dora_peft.ops import choice
from dora_peft.ops.kernels import selfcheck

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
STUBS = {
    "is_available": lambda: True,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "get_device_name": lambda _: "A GPU",
    "get_device_capability": lambda _=None: (9, 0),
    "is_current_stream_capturing": lambda: False,
    "synchronize": lambda _: None,
}


def main() -> None:
    answer, run = choice._answer, selfcheck.run
    asked = []

    def on_gpu(question, **options):
        name, _, dtypes = question
        asked.append(name)
        return answer((name, GPU, dtypes), **options)

    found = {}
    with (
        mock.patch.multiple(torch.cuda, **STUBS),
        mock.patch.object(choice, "_answer", on_gpu),
        mock.patch.object(selfcheck, "run", lambda device, dtype: run(CPU, dtype)),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Linear(32, 16))
        weight, bias = base[1].weight.clone(), base[1].bias.clone()
        model = get_peft_model(base, DoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
        x = torch.randn(6, 48)
        for _ in range(2):
            model(x).square().mean().backward()
        layer = model.base_model.model[1]
        hidden = model.base_model.model[0](x)
        A, B, m = (part["default"].weight for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
        expected = reference.dora_linear(hidden, weight, A, B, m, layer.scaling["default"], bias)
        found["off"] = (model(x) - expected).abs().max().item()
        found["trained"] = [
            name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
        ]
        try:
            dora_peft.implementation("triton")
        except RuntimeError as error:
            found["error"] = str(error)
    found["warnings"] = [str(w.message) for w in caught if "dora_peft" in str(w.message)]
    found["asked"] = sorted(set(asked))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
