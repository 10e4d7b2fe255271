"""`python -m dora_peft.analysis`, see command.py."""

from .command import main

main()
