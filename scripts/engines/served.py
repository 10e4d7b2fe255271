"""What a model says of a prompt, without this package: the quantity that all servers give."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def answers(model: nn.Module, prompt: list[int], new: int) -> dict[str, list[float] | list[int]]:
    """Log-probability of each token of `prompt` but the first, given those before it, and `new` greedy tokens."""
    tokens = list(prompt)
    logits = model(torch.tensor([tokens])).logits[0].float()
    logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    for _ in range(new):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return {"logprobs": logprobs.tolist(), "tokens": tokens[len(prompt) :]}
