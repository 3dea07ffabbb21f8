"""Joint fits against dense least squares, a row at a time, in float64."""

import pytest
import torch

from loftq.core.regression import fit, pooled_fit

GENERATOR = torch.Generator().manual_seed(0)


def moment(features: int) -> torch.Tensor:
    """Of inputs that are correlated."""
    x = torch.randn(3 * features, features, generator=GENERATOR, dtype=torch.float64)
    x = x @ torch.randn(features, features, generator=GENERATOR, dtype=torch.float64)
    return x.T @ x / len(x)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("block", [8, 16, 32])
def test_fit_is_least_squares(shifted: bool, block: int) -> None:
    """Oracle: lstsq on the dense design matrix of each row, whitened by Cholesky."""
    h = moment(32)
    root = torch.linalg.cholesky(h)
    weight = torch.randn(5, 32, generator=GENERATOR)
    levels = torch.randint(-2, 2, (5, 32), generator=GENERATOR).float()
    scales, shifts = fit(weight, levels, h, block, shifted=shifted)
    for row in range(5):
        blocks = torch.eye(32 // block, dtype=torch.float64).repeat_interleave(block, dim=0)  # (in, groups)
        design = blocks * levels[row].double().unsqueeze(1)
        if shifted:
            design = torch.cat([design, blocks], dim=1)
        expected = torch.linalg.lstsq(root.T @ design, root.T @ weight[row].double().unsqueeze(1)).solution.squeeze(1)
        found = torch.cat([scales[row], shifts[row]]) if shifted else scales[row]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_groups_of_one_level_are_fitted_too() -> None:
    """Oracle: the error of the group's best shift alone."""
    h = moment(16)
    weight, levels = torch.randn(3, 16, generator=GENERATOR), torch.ones(3, 16)
    scales, shifts = fit(weight, levels, h, 16, shifted=True)
    best, _ = pooled_fit(weight, h, 16)
    torch.testing.assert_close(scales + shifts, best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pool", [4, 16])
def test_pooled_fit_is_least_squares(pool: int) -> None:
    """Oracle: lstsq of the whitened residual on the whitened pools."""
    h = moment(16)
    root = torch.linalg.cholesky(h)
    residual = torch.randn(6, 16, generator=GENERATOR)
    found, sums = pooled_fit(residual, h, pool)
    pools = torch.eye(16 // pool, dtype=torch.float64).repeat_interleave(pool, dim=0)
    expected = torch.linalg.lstsq(root.T @ pools, root.T @ residual.double().T).solution.T
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sums, pools.T @ h @ pools)
