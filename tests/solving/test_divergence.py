"""The divergence of answers. Oracle: autograd on its formula."""

from __future__ import annotations

import torch

from loftq.solving.divergence import _divergences


def test_the_divergence_has_the_gradient_of_its_formula() -> None:
    """To the last bit."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 50, requires_grad=True)
    values, indices = torch.randn(2, 5, 50).log_softmax(-1).topk(7)
    log_q = logits.gather(-1, indices) - logits.logsumexp(-1, keepdim=True)
    rest_p, rest_q = ((1 - log.exp().sum(-1)).clamp_min(1e-6) for log in (values, log_q))
    wanted = (values.exp() * (values - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()
    found = _divergences(logits, values, indices)
    assert torch.equal(found, wanted)
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert torch.equal(grad, torch.autograd.grad(wanted.sum(), logits)[0])
