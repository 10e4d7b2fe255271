"""One training sequence as the model sees it, with what counts in the loss made visible."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from finetune.encoding import IGNORE

OPEN, CLOSE = "[[", "]]"
COLOUR, PLAIN = "\033[1;32m", "\033[0m"
# tokens of a sequence that are shown
MOST = 512


def show_sample(row: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase, coloured: bool = False) -> str:
    """The decoded first record of a training sequence; what counts in the loss stands between [[ and ]].

    Args:
        row: `input_ids`, `labels`, and for packed records `position_ids`.
        coloured: print what counts in bold green too, for a terminal.
    """
    ids, labels = list(row["input_ids"]), list(row["labels"])
    if "position_ids" in row:
        # the next record of a packed block begins at 0 again
        end = next((at for at, position in enumerate(row["position_ids"]) if at and position == 0), len(ids))
        ids, labels = ids[:end], labels[:end]
    num_counted, num_all = sum(label != IGNORE for label in labels), len(ids)
    start, color = COLOUR if coloured else "", PLAIN if coloured else ""
    parts, before, position = [], "", 0
    for counts, group in groupby(labels[:MOST], key=lambda label: label != IGNORE):
        position += len(list(group))
        # From the start on: a tokenizer may join or split characters where two pieces meet.
        text = tokenizer.decode(ids[:position], clean_up_tokenization_spaces=False)
        piece, before = text[len(before) :], text
        parts.append(f"{start}{OPEN}{piece}{CLOSE}{color}" if counts else piece)
    if num_all > MOST:
        parts.append(f" ... ({num_all - MOST} more tokens)")
    body = "".join(parts).replace("\n", "\n  ")
    return (
        f"a training sequence, decoded; {num_counted} of its {num_all} tokens count in the loss, those in "
        f"{OPEN} {CLOSE}:\n  {body}"
    )
