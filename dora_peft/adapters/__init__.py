"""What is done with the adapters of a whole model, and how they travel to files, from files and between each other.

targets.py       which modules an adapter goes on
checkpoint.py    its tensors in a file that plain PEFT reads; peft_rows.py rows of norm 0 in it, names.py its keys,
                 computed.py masks and parametrizations
card.py          the model card beside it
initial.py       rewritten for a base weight without what its initialisation changed
hotswap.py       another checkpoint in an adapter's place; swappable.py whether it may take it
combine.py       weighted sums of adapters as a new one
merge.py         into the base weights
mixed_batch.py   one adapter per sample
undo.py          any of these taken back if it does not succeed

For adapters that are no model's yet, each a verb of the command `dora-peft`:

info.py          what the files hold
doctor.py        what is wrong with them: doctor_files.py in the files, doctor_patterns.py in expressions of a config,
                 doctor_norms.py against the base
convert.py       written for another tool; formats/ has the formats
push.py          to the Hub: push_files.py which files, push_card.py with which card
"""

from .convert import TARGETS, Conversion, convert
from .doctor import doctor
from .doctor_files import Finding
from .formats import FORMATS, UnreadableError
from .info import Info, info

__all__ = ["FORMATS", "TARGETS", "Conversion", "Finding", "Info", "UnreadableError", "convert", "doctor", "info"]
