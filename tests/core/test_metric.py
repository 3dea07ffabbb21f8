"""Metrics against dense least squares in float64."""

import pytest
import torch

from loftq.core import lowrank
from loftq.core.metric import METRICS, Metric, damped
from loftq.core.rounding import rooted


def inputs(count: int, features: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs of very different sizes, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(1, -2, features, dtype=torch.float64)
    return torch.randn(count, features, generator=generator, dtype=torch.float64) * sizes @ mix


@pytest.mark.parametrize("kind", METRICS)
def test_the_norm_is_that_of_outputs(kind: str) -> None:
    """Oracle: the residual itself; its outputs, were inputs uncorrelated; its outputs, token by token."""
    x = inputs(200, 12)
    moment = x.T @ x / len(x)
    residual = torch.randn(7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = {
        "identity": residual.square().sum(),
        "diagonal": (residual.square() * moment.diagonal()).sum(),
        "full": (x @ residual.T).square().sum(dim=1).mean(),
    }[kind]
    assert Metric.of(kind, moment).norm(residual) ** 2 == pytest.approx(float(expected), rel=1e-9)


def least_squares(weight: torch.Tensor, x: torch.Tensor, rank: int) -> float:
    """The least ‖(W − B A) xᵀ‖² over A, B of a rank: reduced-rank regression of x Wᵀ on x, by a dense SVD."""
    outputs = x @ weight.T  # the regression of which on x is exact, so that the best fit truncates it
    u, s, vh = torch.linalg.svd(outputs, full_matrices=False)
    return float((outputs - u[:, :rank] * s[:rank] @ vh[:rank]).square().sum() / len(x))


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (9, 9)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_factors_are_the_least_squares_solution(shape: tuple[int, int], rank: int) -> None:
    """Oracle: `least_squares`."""
    x = inputs(64, shape[1])
    moment = x.T @ x / len(x)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    metric = Metric.of("full", moment)
    factors = lowrank.exact(metric.whiten(weight), rank)
    product = factors.left @ metric.unwhiten(factors.right)
    assert metric.norm(weight - product) ** 2 == pytest.approx(least_squares(weight, x, rank), rel=1e-6)


@pytest.mark.parametrize("kind", METRICS)
def test_unwhiten_takes_back(kind: str) -> None:
    """Oracle: the matrix itself."""
    metric = Metric.of(kind, damped(inputs(40, 8).T @ inputs(40, 8) / 40))
    matrix = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(metric.unwhiten(metric.whiten(matrix)), matrix)


@pytest.mark.parametrize("size", [7, 300])  # one part of the root, and three
@pytest.mark.parametrize("kind", [*METRICS, "upper", "wide"])
def test_whitened_residuals_and_pulls_are_products(kind: str, size: int) -> None:
    """Oracle: dense products with the root; E H, for H = R Rᵀ written out."""
    x = inputs(2 * size, size)
    moment = damped(x.T @ x / len(x))
    metric = (
        Metric.of(kind, moment)
        if kind in METRICS
        else Metric(rooted(moment, x[:3].T if kind == "wide" else None), True)
    )
    residual = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    root = torch.eye(size, dtype=torch.float64) if metric.root is None else metric.root
    root = torch.diag(root) if root.dim() == 1 else root
    assert kind != "wide" or root.shape == (size, size + 3)
    torch.testing.assert_close(metric.whiten(residual), residual @ root)
    expected = residual @ (moment if kind in ("full", "upper", "wide") else root @ root.T)
    torch.testing.assert_close(
        metric.pulls(metric.whiten(residual)), expected, rtol=1e-6, atol=1e-8 * float(moment.diagonal().mean())
    )
    single = metric.pulls(metric.whiten(residual.float())).double()
    assert float((single - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_singular_moments_are_damped(tokens: int) -> None:
    """Oracle: a decomposition that needs every eigenvalue above zero; no tokens at all leave the identity."""
    x = inputs(5, 16)[:tokens]
    moment = damped(x.T @ x / max(tokens, 1))
    assert float(torch.linalg.eigvalsh(moment)[0]) > 0
    assert Metric.of("full", moment).root is not None
    if not tokens:
        torch.testing.assert_close(moment, torch.eye(16, dtype=torch.float64))
