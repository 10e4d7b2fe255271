"""Make a data set of questions about pictures from easy-vqa: coloured shapes, 64 x 64 pixels.

    python scripts/prepare_easy_vqa.py

Runs on the CPU, in half a minute, after a download of 3 MB. Expected result, for the parts `train` (4,000 pictures,
38,575 questions) and `test` (1,000 and 9,673) of the data set:

    data/easy_vqa/PART.safetensors   features [pictures, 64, 192] uint8: the pixels of patches of 8 x 8
    data/easy_vqa/PART.jsonl         {"picture": 0, "question": "what is the blue shape?", "answer": "rectangle"}

A second run keeps what is there. The package `easy-vqa` (MIT licence) carries the data.
"""

import argparse
import io
import json
import tempfile
import zipfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmark_common import replacing
from wheel_data import download_wheel

REQUIREMENT = "easy-vqa==1.0"
PATCH = 8


def patchify(pixels: Tensor, patch: int = PATCH) -> Tensor:
    """[height, width, channels] to [patches, patch * patch * channels], row by row."""
    height, width, channels = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"expected a height and a width divisible by {patch}, found {height} x {width}")
    blocks = pixels.view(height // patch, patch, width // patch, patch, channels)
    return blocks.transpose(1, 2).reshape(-1, patch * patch * channels)


def read_picture(content: bytes) -> Tensor:
    """The pixels of a picture file, [height, width, 3] uint8."""
    with Image.open(io.BytesIO(content)) as picture:
        width, height = picture.size
        return torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).view(height, width, 3)


def write_part(archive: zipfile.ZipFile, part: str, folder: Path) -> None:
    """Write one part of the data set: its pictures' features, then its questions."""
    questions = json.loads(archive.read(f"easy_vqa/data/{part}/questions.json"))
    count = 1 + max(picture for _, _, picture in questions)
    features = [patchify(read_picture(archive.read(f"easy_vqa/data/{part}/images/{i}.png"))) for i in range(count)]
    with replacing(folder / f"{part}.safetensors") as temporary:
        save_file({"features": torch.stack(features)}, temporary)
    lines = [json.dumps({"picture": i, "question": question, "answer": answer}) for question, answer, i in questions]
    with replacing(folder / f"{part}.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {folder / part}.jsonl ({len(questions)} questions) and .safetensors ({count} pictures)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/easy_vqa"))
    folder = parser.parse_args().output_dir
    # the questions of a part are written last, so they tell that it is whole
    missing = [part for part in ("train", "test") if not (folder / f"{part}.jsonl").is_file()]
    if not missing:
        print(f"{folder} is there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        wheel = download_wheel(REQUIREMENT, Path(temporary), f"write the files that --help describes to {folder}")
        with zipfile.ZipFile(wheel) as archive:
            for part in missing:
                write_part(archive, part, folder)


if __name__ == "__main__":
    main()
