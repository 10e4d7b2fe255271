"""What several data sets share: the prompt that spells a word, and the split into training and test."""

import random
from collections.abc import Iterable


def format_prompt(word: str) -> str:
    """The prompt for one word. Letters stand apart because a tokenizer that merges them would hide the spelling."""
    return f"Say {' '.join(word)}:"


def split_words(words: Iterable[str], num_test: int, seed: int) -> tuple[list[str], list[str]]:
    """Shuffle the words and set `num_test` of them aside, the same ones for the same seed.

    Returns:
        The words for training and those for testing.

    Raises:
        ValueError: no word would be left for training.
    """
    shuffled = sorted(words)
    if num_test >= len(shuffled):
        raise ValueError(f"num_test must be below the number of words, {len(shuffled)}, but it is {num_test}")
    random.Random(seed).shuffle(shuffled)
    return shuffled[num_test:], shuffled[:num_test]
