"""How far the quantized model's answers are from those of the full-precision model, and the gradient of that.

The divergence of a token is KL(p ‖ q), for which the likeliest tokens under p are known one by one, and all others as
one sum; or the squared error of the last hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from loftq.models.cheap_activations import keeping_less
from loftq.models.head_loss import HiddenStates, chunked

_LEAST = 1e-6  # smallest probability: the precision of 1 minus a sum in float32
_ANSWERS = ("indices", "values", "hidden")

Window = Mapping[str, torch.Tensor]


def _divergence(answer: Any, window: Window) -> torch.Tensor:
    """The mean over tokens of KL(p ‖ q), or the squared error of hidden states divided by their square.

    `window` holds the logarithms of the largest probabilities of p, `values` (batch, length, k), with their tokens,
    `indices`; or `hidden` (batch, length, width).
    """
    if "hidden" in window:
        expected = window["hidden"].float()
        error: torch.Tensor = (answer[0].float() - expected).square().sum() / expected.square().sum()
        return error
    return _divergences(answer.logits, window["values"], window["indices"]).mean()


def _divergences(logits: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of each token (…) from logits (…, classes) and the likeliest tokens under p (…, k)."""
    log_q: torch.Tensor = _LogProbabilities.apply(logits.float(), indices.long())  # type: ignore[no-untyped-call]
    log_p = values.float()
    likeliest = (log_p.exp() * (log_p - log_q)).sum(-1)
    rest_p, rest_q = ((1 - log.exp().sum(-1)).clamp_min(_LEAST) for log in (log_p, log_q))
    return likeliest + rest_p * (rest_p / rest_q).log()


class _LogProbabilities(torch.autograd.Function):
    """The logarithms of the softmax of logits (…, classes) at `indices` (…, k), which differ.

    The gradient, -softmax · Σ g with g added at the indices, is made in one tensor as large as the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        total = logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, total, indices)
        return logits.gather(-1, indices) - total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        logits, total, indices = ctx.saved_tensors
        of_logits = (logits - total).exp_().mul_(grad.neg().sum(-1, keepdim=True))
        return of_logits.scatter_add_(-1, indices, grad), None


def divergence_of(core: nn.Module, states: HiddenStates, window: Window) -> torch.Tensor:
    """The divergence of a model's answers to a window, without the logits of all tokens at once if that is possible."""
    inputs = token_ids(window)

    def run() -> Any:
        with keeping_less(window["input_ids"].device, products=True):
            return core(**inputs)

    output = states.of(run) if "values" in window else None
    if output is None:
        return _divergence(run(), window)
    hidden, values, indices = (part.flatten(0, -2) for part in (output.logits, window["values"], window["indices"]))

    def loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return _divergences(logits, values[rows], indices[rows]).sum()

    return chunked(hidden, cast(nn.Module, states.head), loss) / len(hidden)


def token_ids(window: Window) -> dict[str, torch.Tensor]:
    """The inputs of a model, without its answers."""
    return {name: tensor.long() for name, tensor in window.items() if name not in _ANSWERS}
