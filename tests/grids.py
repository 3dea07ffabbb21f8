"""Cases of a test that has many parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """So many cases of a product that all pairs of values are among them: any two of two parameters that ever meet.

    For parameters that different lines of the code look at: shape, width, zero-point, path. What goes wrong for one
    value, or where two meet, one of the cases shows; the whole product would show it ten times. A value of an axis that
    is a tuple stands for several parameters, whose other combinations do not occur.
    """
    whole = [
        tuple(part for value in case for part in (value if isinstance(value, tuple) else (value,)))
        for case in product(*axes)
    ]
    pairs = {case: set(combinations(enumerate(case), 2)) for case in whole}
    left = set().union(*pairs.values())
    chosen = []
    for least in range(len(pairs[whole[0]]), 0, -1):  # first those that bring many new pairs
        for case in whole:
            if len(pairs[case] & left) >= least:
                chosen.append(case)
                left -= pairs[case]
    return chosen


def thinned(cases: Iterable[tuple[Any, ...]], keep: Callable[..., bool]) -> list[Any]:
    """All cases of a test. Those that `keep` does not name, called with a case, are marked slow.

    For cases that repeat what others show with another name or another number.
    """
    return [pytest.param(*case, marks=() if keep(*case) else pytest.mark.slow) for case in cases]
