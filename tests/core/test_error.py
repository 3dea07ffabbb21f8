"""The squared error of a quantized weight and its adapter: the oracle is numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loftq.core.error import squared_error
from loftq.core.kernels import dispatch


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pool", [None, 4])
@pytest.mark.parametrize("metric", ["weights", "diagonal", "full"])
@pytest.mark.parametrize("small", [False, True])
def test_the_error_is_that_of_float64(
    pool: int | None, metric: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "CHUNK", 64)  # several parts
    columns = 24
    a, b = draw(3, columns // (pool or 1), seed=0), draw(20, 3, seed=1)
    delta = 0.5 * b.double().numpy() @ a.double().numpy()
    if pool is not None:
        delta = np.repeat(delta * columns / pool / pool, pool, axis=1)
    backbone = draw(20, columns, seed=2)
    noise = 1e-7 if small else 1.0
    weight = (backbone.double() + torch.from_numpy(delta) + noise * draw(20, columns, seed=3)).float()
    root = {"weights": None, "diagonal": draw(columns, seed=4), "full": draw(columns, columns, seed=5).tril()}[metric]
    error = weight.double().numpy() - backbone.double().numpy() - delta
    if root is not None:
        error = error * root.double().numpy() if root.dim() == 1 else error @ root.double().numpy()
    computed = squared_error(weight, backbone, (a, b), 0.5, pool, root)
    assert computed == pytest.approx(float((error**2).sum()), rel=1e-6)


def test_without_an_adapter_it_is_that_of_the_backbone() -> None:
    weight, backbone = draw(4, 8, seed=0) * 1e30, draw(4, 8, seed=1) * 1e30
    expected = float((weight.double() - backbone.double()).square().sum())
    assert squared_error(weight, backbone, None) == pytest.approx(expected, rel=1e-12)
