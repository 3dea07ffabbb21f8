"""Pairwise cases. Oracle: the pairs of the whole product."""

from __future__ import annotations

from itertools import combinations, product

from grids import pairwise


def test_every_pair_of_the_product_occurs_in_few_cases() -> None:
    axes = ([(1, 2), (3, 4), (3, 5)], ["a", "b", "c"], [None, True])
    whole = {(*first, second, third) for first, second, third in product(*axes)}
    chosen = pairwise(*axes)
    assert set(chosen) <= whole
    assert len(chosen) == 9
    held, wanted = ({pair for case in cases for pair in combinations(enumerate(case), 2)} for cases in (chosen, whole))
    assert held == wanted
