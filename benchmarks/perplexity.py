"""What a model makes of a text, in windows: perplexity, and how far its answers are from another model's."""

from __future__ import annotations

import math
from typing import Any

import torch


def perplexity(model: Any, tokens: torch.Tensor, windows: int, length: int) -> float:
    """Over the first `windows` disjoint windows of `length` tokens (1, n): exp of the mean negative log likelihood.

    A window's first token is not scored.
    """
    return against(model, None, tokens, windows, length)[0]


@torch.no_grad()
def against(model: Any, exact: Any, tokens: torch.Tensor, windows: int, length: int) -> tuple[float, float]:
    """Perplexity, and the mean over tokens of KL(p ‖ q) in nats, p another model's distribution; 0 without one."""
    model.eval()
    loss = divergence = 0.0
    for start in range(0, windows * length, length):
        window = tokens[:, start : start + length]
        log_q = model(input_ids=window).logits[0, :-1].float().log_softmax(-1)  # (length - 1, vocabulary)
        loss += float(torch.nn.functional.nll_loss(log_q, window[0, 1:], reduction="sum"))
        if exact is not None:
            log_p = exact(input_ids=window).logits[0, :-1].float().log_softmax(-1)
            divergence += float(torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
    scored = windows * (length - 1)
    return math.exp(loss / scored), divergence / scored
