"""Perplexity on a text in windows: exp of the mean negative log likelihood a token."""

from __future__ import annotations

import math
from typing import Any

import torch


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor, windows: int, length: int) -> float:
    """Over the first `windows` disjoint windows of `length` tokens (1, n); a window's first token is not scored."""
    model.eval()
    total = 0.0
    for start in range(0, windows * length, length):
        window = tokens[:, start : start + length]
        logits = model(input_ids=window).logits[0, :-1].float()  # (length - 1, vocabulary)
        total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return math.exp(total / (windows * (length - 1)))
