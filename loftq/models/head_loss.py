"""Losses on the logits of a model, a few tokens at a time, so that the logits of a whole batch never exist.

The logits of 2,048 tokens over 49,152 classes take 0.4 GB in float32, and their loss and gradient as much again. Here
the model stops before its output head. The loss of some tokens, and its gradient with respect to their hidden states,
are computed together in the forward pass; only the gradient of the hidden states is kept for the backward pass:

    L = Σ_chunks ℓ(h_c Wᵀ),        ∂L/∂h_c = ∂ℓ/∂(h_c Wᵀ) · W.

So the weight W of the head must not train. A model whose logits are more than its head's outputs (scaled, soft-capped,
with a bias of their own) takes the usual way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LOGITS = 1 << 23  # logits that exist at a time
IGNORED = -100  # a label that is not learned, as in transformers

ChunkLoss = Callable[[torch.Tensor, slice], torch.Tensor]  # from logits (n, classes) of some rows to the sum of losses


class HiddenStates:
    """Runs a model without its output head, if its logits are just the head's outputs and the head does not train."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._refused = False

    @property
    def head(self) -> nn.Module | None:
        """The output head, if it is a linear that does not train."""
        head: Any = self._model.get_output_embeddings()
        trains = head is not None and any(parameter.requires_grad for parameter in head.parameters())
        return None if head is None or trains or type(head) is not nn.Linear else head

    def of(self, run: Callable[[], Any]) -> Any | None:
        """The output of the model as `run` calls it, with hidden states (…, width) in the place of the logits.

        None if the model needs its usual way, which is found out at its first run.
        """
        head = self.head
        if self._refused or head is None:
            return None
        try:
            with _passing(head) as passed:
                output = run()
        except (RuntimeError, ValueError, IndexError):  # it computes with the logits
            if not passed:
                raise
            output = None
        logits = getattr(output, "logits", None)
        if logits is None or len(passed) != 1 or not _is_same(logits, passed[0]):
            self._refused = True
            return None
        return output


@contextmanager
def _passing(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Let a head return its inputs, which are also listed."""
    passed: list[torch.Tensor] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        passed.append(hidden)
        return hidden

    own = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield passed
    finally:
        del head.__dict__["forward"]
        if own is not None:
            head.__dict__["forward"] = own


@torch.no_grad()
def _is_same(logits: torch.Tensor, hidden: torch.Tensor) -> bool:
    if logits is hidden or logits.shape != hidden.shape:
        return logits is hidden
    return logits.is_meta or torch.equal(logits.float(), hidden.float())


def chunked(hidden: torch.Tensor, head: nn.Module, loss: ChunkLoss) -> torch.Tensor:
    """The sum of losses of hidden states (n, width), whose logits are computed a few rows at a time."""
    total: torch.Tensor = _Chunked.apply(hidden, head, loss)  # type: ignore[no-untyped-call]
    return total


class _Chunked(torch.autograd.Function):
    """Computes a loss together with its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Any, loss: ChunkLoss) -> torch.Tensor:
        needed = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if needed else None
        step = max(LOGITS // head.out_features, 1)
        for start in range(0, len(hidden), step):
            rows = slice(start, min(start + step, len(hidden)))
            with torch.set_grad_enabled(needed):
                part = hidden[rows].detach().requires_grad_(needed)
                value = loss(head(part.to(head.weight.dtype)), rows)
            total += value.detach()
            if grad is not None:
                (grad[rows],) = torch.autograd.grad(value, part)
        ctx.grad = grad
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(upstream.to(grad.dtype)), None, None


def next_token_loss(
    hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, *, smoothing: float = 0.0
) -> tuple[torch.Tensor, int]:
    """The sum of the cross-entropies in nats, and the number of tokens that are learned.

    `hidden` (batch, length, width) are the states before the head; the label of a position is the token after it, in
    `labels` (batch, length). Only positions whose label is learned get logits.
    """
    targets = labels[:, 1:].reshape(-1)
    learned = (targets != IGNORED).nonzero().squeeze(1)
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])[learned]
    targets = targets[learned]

    def loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.float(), targets[rows], reduction="sum", label_smoothing=smoothing)

    return chunked(states, head, loss), len(targets)
