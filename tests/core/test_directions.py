"""Oracles: the eigenvectors of `torch.linalg.eigh`, and the closed form of the best factors."""

from __future__ import annotations

import torch

from loftq.core import directions, lowrank
from loftq.core.metric import Metric, damped


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(600, 48) @ (torch.randn(48, 48) * torch.logspace(0.5, -1, 48)).T
    return torch.randn(40, 48), damped(inputs.T @ inputs / 600)


def test_directions_are_the_leading_eigenvectors() -> None:
    _, h = problem()
    found = directions.leading_directions(h, 6, torch.Generator().manual_seed(0))
    expected = torch.linalg.eigh(h).eigenvectors[:, -6:].float()
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-4)


def test_the_adapter_adds_what_is_left_out_at_no_cost() -> None:
    """The error of the best factors is the same for a backbone with any part along the directions, up to the rank."""
    weight, h = problem()
    basis = directions.leading_directions(h, 6, torch.Generator().manual_seed(0))
    left = directions.without_directions(weight, 3 * basis)  # only the span matters
    assert float((left @ basis).norm()) < 1e-4 * float(weight.norm())
    torch.testing.assert_close(left + weight @ basis @ basis.T, weight, rtol=1e-4, atol=1e-4)
    metric = Metric.of("full", h)
    factors = lowrank.exact(metric.whiten(weight - left), 6)
    product = factors.left @ metric.unwhiten(factors.right)
    assert metric.norm(weight - left - product) < 1e-3 * metric.norm(weight)
