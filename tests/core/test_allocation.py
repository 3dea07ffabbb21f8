"""Allocation against trying everything."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from loftq.core.allocation import _TRUST, first, least_error, waterfilled
from loftq.errors import OptionError


def mean(weights: list[int], widths: list[int]) -> float:
    return sum(n * b for n, b in zip(weights, widths, strict=True)) / sum(weights)


@pytest.mark.parametrize("budget", [2.0, 2.3, 2.5, 2.71, 3.3, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_least_error_of_all(budget: float, seed: int) -> None:
    """Oracle: all 3^7 choices."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(1, 9, (7,), generator=generator).tolist()
    scale = torch.rand(7, generator=generator)
    errors = {b: (scale * 4.0**-b * (1 + torch.rand(7, generator=generator))).tolist() for b in (2, 3, 4)}
    found = least_error(weights, errors, budget)
    assert mean(weights, found) <= budget + 1e-9
    allowed = [choice for choice in product((2, 3, 4), repeat=7) if mean(weights, list(choice)) <= budget + 1e-9]
    best = min(sum(errors[b][i] for i, b in enumerate(choice)) for choice in allowed)
    assert sum(errors[b][i] for i, b in enumerate(found)) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("budget", "wide"), [(2, 0), (2.25, 4), (2.5, 8), (3, 16), (4, 32)])
def test_the_papers_first_layers(budget: float, wide: int) -> None:
    """Oracle: the paper's counts of 4-bit layers of the 32 of LLAMA-2-7b."""
    assert first([7] * 32, 2, 4, budget) == [4] * wide + [2] * (32 - wide)


def test_a_large_one_is_exact_and_quick() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randint(1, 30, (560,), generator=generator) * 1_000_000).tolist()
    scale = torch.rand(560, generator=generator).square() * 1e4
    errors = {b: (scale * 3.7**-b).tolist() for b in (2, 3, 4)}
    found = least_error(weights, errors, 2.7)
    assert 2.69 < mean(weights, found) <= 2.7 + 1e-9


@pytest.mark.parametrize("budget", [1.9, 4.1])
def test_a_budget_outside_the_widths(budget: float) -> None:
    with pytest.raises(OptionError, match="outside 2 to 4"):
        first([1, 1], 2, 4, budget)
    with pytest.raises(OptionError, match="outside 2 to 4"):
        least_error([1, 1], {2: [1, 1], 4: [0, 0]}, budget)


@pytest.mark.parametrize(("budget", "narrow", "wide"), [(2.25, 1.5, 4.0), (1.6, 1.5, 4.0), (3.9, 1.5, 4.0)])
@pytest.mark.parametrize("seed", range(3))
def test_no_hundredth_of_a_bit_is_better_elsewhere(budget: float, narrow: float, wide: float, seed: int) -> None:
    """Oracle: the sum of the errors that it minimizes, after moving weights' bits from each layer to each other one."""
    generator = torch.Generator().manual_seed(seed)
    weights = [n * 1000 for n in torch.randint(1, 9, (12,), generator=generator).tolist()]
    errors = (torch.randn(12, generator=generator) * 3).exp2().tolist()
    found = waterfilled(weights, errors, budget, narrow, wide)
    assert all(narrow <= width <= wide and width == round(100 * width) / 100 for width in found)
    spent = sum(n * b for n, b in zip(weights, found, strict=True)) / sum(weights)
    assert budget - 0.01 < spent <= budget + 1e-9
    followed = [n * (e / n) ** _TRUST for n, e in zip(weights, errors, strict=True)]
    slopes = [
        error * 4.0**-width / n for error, width, n in zip(followed, found, weights, strict=True)
    ]  # a weight's bit
    gains = [slope for slope, width in zip(slopes, found, strict=True) if width < wide]
    losses = [slope for slope, width in zip(slopes, found, strict=True) if width > narrow]
    assert max(gains) <= min(losses) * 4.0**0.0101


def test_layers_without_errors_get_the_fewest_bits() -> None:
    assert waterfilled([1000, 1000], [0.0, 1.0], 2.5, 1.5, 4) == [1.5, 3.5]
    assert waterfilled([10, 30], [0.1, 0.3], 2.37, 1.5, 4) == [2.37, 2.37]
    with pytest.raises(OptionError, match=r"outside 1\.5 to 4"):
        waterfilled([1], [1.0], 1.25, 1.5, 4)
