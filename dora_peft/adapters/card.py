"""The model card of a saved adapter: what it is, and how to load it with and without this package."""

from __future__ import annotations

import os

from huggingface_hub import ModelCard

from ..config import DoraConfig

# Where the project can be found; empty until there is such a place. The card, README and [project.urls] of
# pyproject.toml name no other: whoever took a name that is free could have it installed in our place.
PROJECT_ADDRESS = ""
_START, _END = "<!-- dora_peft: start -->", "<!-- dora_peft: end -->"


def remove_generic_card(folder: str) -> None:
    """Remove the README.md that transformers' push_to_hub wrote over PEFT's, if it is that one."""
    path = os.path.join(folder, "README.md")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            generic = "This is the model card of a 🤗 transformers model" in file.read()
        if generic:
            os.remove(path)


def complete_model_card(folder: str, config: DoraConfig, repo_id: str | None = None) -> None:
    """Add or replace the DoRA section of the README.md that PEFT wrote into a folder.

    Args:
        folder: Where the adapter was saved.
        config: The adapter's config.
        repo_id: The Hub repository that the folder goes to, if it does.
    """
    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path)
    section = adapter_section(config, card.data.get("base_model"), repo_id or "<this repository or folder>")
    complete(card, section, "dora", "lora")
    card.save(path)


def complete(card: ModelCard, section: str, *tags: str) -> None:
    """Add the package's section to a card, or replace it by another one, and tags to those that it has."""
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *tags})
    before, _, rest = card.text.partition(_START)
    after = rest.partition(_END)[2].lstrip("\n")
    card.text = f"{before.rstrip()}\n\n{_START}\n{section}\n{_END}\n{after}".lstrip()


def adapter_section(config: DoraConfig, base_model: str | None, where: str) -> str:
    """What a DoRA adapter in PEFT's format is, and how to load it from a repository or folder `where`."""
    base = base_model or config.base_model_name_or_path or "the base model"
    auto = {"SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "CAUSAL_LM": "AutoModelForCausalLM"}.get(
        str(getattr(config.task_type, "value", config.task_type)), "AutoModel"
    )
    package = f"[dora_peft]({PROJECT_ADDRESS})" if PROJECT_ADDRESS else "dora_peft"
    return f"""## DoRA adapter

| | |
|---|---|
| Base model | {base} |
| Method | DoRA, weight-decomposed low-rank adaptation ([arXiv 2402.09353](https://arxiv.org/abs/2402.09353)) |
| Rank | r = {config.r}, lora_alpha = {config.lora_alpha}, dropout {config.lora_dropout} |
| Norm | {"detached from" if config.detach_norm else "part of"} the gradient |

With plain PEFT, no other package needed:

```python
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{where}")
```

With {package}, the tuner that trained it, one line comes first:

```python
import dora_peft
```"""
