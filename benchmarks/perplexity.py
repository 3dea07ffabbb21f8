"""What a model makes of a text, in windows: perplexity, and how far its answers are from another model's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch


def perplexity(model: Any, tokens: torch.Tensor, windows: int, length: int) -> float:
    """Over the first `windows` disjoint windows of `length` tokens (1, n): exp of the mean negative log likelihood.

    A window's first token is not scored.
    """
    return against(model, None, tokens, windows, length)[0]


def against(
    model: Any, exact: list[torch.Tensor] | None, tokens: torch.Tensor, windows: int, length: int
) -> tuple[float, float]:
    """Perplexity, and the mean over tokens of KL(p ‖ q) in nats, p given by its `answers`; 0 without them."""
    loss = divergence = 0.0
    for at, log_q in enumerate(_answers(model, tokens, windows, length)):
        target = tokens[0, at * length + 1 : (at + 1) * length]
        loss += float(torch.nn.functional.nll_loss(log_q, target, reduction="sum"))
        if exact is not None:
            divergence += float(torch.nn.functional.kl_div(log_q, exact[at].float(), reduction="sum", log_target=True))
    scored = windows * (length - 1)
    return math.exp(loss / scored), divergence / scored


def answers(model: Any, tokens: torch.Tensor, windows: int, length: int) -> list[torch.Tensor]:
    """A model's log-probabilities of all tokens, float16 (length - 1, vocabulary) a window."""
    return [log_p.half() for log_p in _answers(model, tokens, windows, length)]


@torch.no_grad()
def _answers(model: Any, tokens: torch.Tensor, windows: int, length: int) -> Iterator[torch.Tensor]:
    model.eval()
    for start in range(0, windows * length, length):
        window = tokens[:, start : start + length].to(model.device)
        yield model(input_ids=window).logits[0, :-1].float().log_softmax(-1).cpu()
