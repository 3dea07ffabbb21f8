"""Second moments against x xᵀ in float64."""

from __future__ import annotations

import pytest
import torch

from loftq.core import moments
from loftq.core.kernels import products
from loftq.core.moments import Moment, assemble


def batches(size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    spread = torch.linspace(0.1, 5, size)
    return [(torch.randn(*shape, size, generator=generator) * spread).to(dtype) for shape in ((3, 50), (2, 7), (1,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 33, 64])  # around panels of 16 rows
@pytest.mark.parametrize("fast", [False, True])
def test_moment_is_the_mean_of_outer_products(
    size: int, dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "PANEL", 16)
    monkeypatch.setattr(moments, "STRIP", 6)
    monkeypatch.setattr(products, "are_fast", lambda: fast)
    moment = Moment(size)
    for batch in batches(size, dtype):
        moment.add(batch)
    rows = torch.cat([batch.reshape(-1, size) for batch in batches(size, dtype)]).double()
    expected = rows.t() @ rows / len(rows)
    found = assemble(moment.mean())
    assert found.dtype == torch.float32
    assert moment.count == len(rows) == 165
    assert torch.equal(found, found.t())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.diagonal().mean()))


def test_sums_and_means_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "PANEL", 16)
    first, second, third = batches(40)
    parts = [Moment(40) for _ in range(3)]
    whole = Moment(40)
    for part, batch in zip(parts, (first, second, third), strict=True):
        part.add(batch)
        whole.add(batch)
    merged = Moment(40).merge(parts[0]).merge(parts[1]).merge_mean(parts[2].mean(), parts[2].count)
    assert merged.count == whole.count
    torch.testing.assert_close(assemble(merged.mean()), assemble(whole.mean()), rtol=1e-6, atol=1e-6)
