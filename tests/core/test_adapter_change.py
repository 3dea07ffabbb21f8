"""What training changed, as an adapter. Oracle: the dense difference and its singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from loftq.core.adapter_change import change, truncated


def test_the_change_and_its_best_truncation() -> None:
    a, a0 = torch.randn(4, 40), torch.randn(3, 40)
    b, b0 = torch.randn(24, 4), torch.randn(24, 3)
    dense = 2 * b.double() @ a.double() - 0.5 * b0.double() @ a0.double()
    whole = change((a, b), 2.0, (a0, b0), 0.5)
    assert whole[0].shape == (7, 40)
    torch.testing.assert_close(whole[1].double() @ whole[0].double(), dense, rtol=1e-5, atol=1e-5)
    values = torch.linalg.svdvals(dense)
    for rank in (7, 5, 1):
        (right, left), rest, norm = truncated(whole, rank)
        assert (len(right), left.shape[1]) == (rank, rank)
        assert float((dense - left.double() @ right.double()).square().sum()) == pytest.approx(
            float(values[rank:7].square().sum()), rel=1e-4, abs=1e-8
        )
        assert rest == pytest.approx(float(values[rank:7].square().sum()), rel=1e-4, abs=1e-8)
        assert norm == pytest.approx(float(values.square().sum()), rel=1e-6)
