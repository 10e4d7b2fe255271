"""`python -m dora_peft.analysis`, see the package."""

from . import main

main()
