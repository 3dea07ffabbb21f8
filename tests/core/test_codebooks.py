"""Codebooks against bitsandbytes' tables and against the published construction in float64."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from scipy.stats import norm

from loftq.core.codebooks import INTEGERS, TABLES, codebook, dynamic_map, labels
from loftq.errors import UnknownNameError


def quantiles(bits: int) -> np.ndarray:
    """QLoRA's NormalFloat in float64: quantiles of the normal distribution, zero, one level more above than below."""
    above, below = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    steps = [0.5 + (0.9677083 - 0.5) * np.arange(1, count + 1) / count for count in (above, below)]
    levels = np.concatenate([-norm.ppf(steps[1])[::-1], [0.0], norm.ppf(steps[0])])
    return levels / norm.ppf(0.9677083)


def test_nf4_is_bitsandbytes_table_to_the_last_bit() -> None:
    assert torch.equal(codebook("nf4"), bnb.get_4bit_type("nf4", device="cpu"))


def test_dynamic_map_is_bitsandbytes_to_the_last_bit() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize(("name", "bits"), TABLES.items())
def test_normal_float_is_the_float64_construction(name: str, bits: int) -> None:
    # The evenly spaced probabilities are float32 in the table: 1e-7 there is at most 1e-6 in a quantile.
    np.testing.assert_allclose(codebook(name).double().numpy(), quantiles(bits), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "bits"), TABLES.items())
def test_levels_ascend_around_an_exact_zero_with_one_more_above(name: str, bits: int) -> None:
    levels = codebook(name)
    assert levels.dtype == torch.float32
    assert levels.shape == (2**bits,)
    assert bool((levels.diff() > 0).all())
    assert (levels[0], levels[-1]) == (-1, 1)
    assert [int((levels < 0).sum()), int((levels == 0).sum()), int((levels > 0).sum())] == [
        2 ** (bits - 1) - 1,
        1,
        2 ** (bits - 1),
    ]


def test_unknown_codebook_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown codebook 'nf5'.*known: int2, .*nf2, nf3, nf4"):
        codebook("nf5")


@pytest.mark.parametrize(("name", "bits"), INTEGERS.items())
def test_integers_are_the_whole_numbers_of_a_width(name: str, bits: int) -> None:
    assert codebook(name).tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def test_many_widths_are_shown_as_two() -> None:
    few, many = ["nf2", "nf4", "tcq1.5", "tcq2"], [f"tcqfast{n / 100:g}" for n in (150, 175, 333, 201, 202)]
    assert labels(few) == {name: name for name in few}
    assert labels([*few, *many]) == {name: name for name in few} | dict.fromkeys(many, "tcqfast1.5 to 3.33")
