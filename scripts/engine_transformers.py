"""transformers with PEFT: answers of each form of an adapter, and of the DoRA adapter itself by this package.

python scripts/engine_transformers.py FOLDER      # as scripts/check_serving.py made it
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import dora_peft  # noqa: F401  PEFT reads a DoRA adapter as this package's layers
from engines.served import answers

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    rows = {}
    for name, case in plan["cases"].items():
        if "transformers" not in case["engines"]:
            continue
        about = plan["models"][case["model"]]
        model = AutoModelForCausalLM.from_pretrained(folder / case["base"], dtype=DTYPES[case["dtype"]])
        if case["adapter"] is not None:
            model = PeftModel.from_pretrained(model, folder / case["adapter"])
        rows[name] = answers(model.eval(), about["prompt"], about["new"])
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft")}
    (folder / "transformers.json").write_text(json.dumps({"versions": versions, "rows": rows}))


if __name__ == "__main__":
    main()
