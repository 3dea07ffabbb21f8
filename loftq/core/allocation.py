"""Choice of the number of bits of each layer under a budget of mean bits per weight.

With n_l weights in layer l, and the squared error e_l,b that b bits leave in it,

    minimize Σ e_l,b(l)   subject to   Σ n_l · b(l) ≤ budget · Σ n_l.

This is a knapsack problem with one choice of width per layer, solved exactly as an integer program (HiGHS, through
scipy). The paper's own rule (LoftQ, arXiv 2310.08659, section 4) needs no errors: the first layers get the most bits,
the others the fewest.

Where any hundredth of a bit is a width, errors fall by nearly a factor of 4 a bit, and the optimum has a closed form,
reverse water-filling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from loftq.errors import OptionError

_TRUST = 0.75  # part of the differences between layers that is followed: their errors are estimates of a sample
_LEAST = 1e-30  # an error of a weight


def first(weights: Sequence[int], narrow: float, wide: float, budget: float) -> list[float]:
    """Give `wide` bits to as many layers from the first on as the budget allows, and `narrow` to the others.

    `weights` are the layers' numbers of weights. Raises OptionError for a budget that the widths cannot meet.
    """
    _check(narrow, wide, budget)
    wide_weights = (budget - narrow) * sum(weights) / (wide - narrow) * (1 + 1e-9)  # that may still get `wide` bits
    widths: list[float] = []
    for count in weights:
        wide_weights -= count
        widths.append(wide if wide_weights >= 0 else narrow)
    return widths


def least_error(weights: Sequence[int], errors: Mapping[float, Sequence[float]], budget: float) -> list[float]:
    """The widths of layers that minimize the sum of their errors. `errors` maps a width to the errors of all layers.

    `weights` are the layers' numbers of weights. Raises OptionError for a budget that the widths cannot meet.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    widths = sorted(errors)
    _check(widths[0], widths[-1], budget)
    layers = len(weights)
    cost = np.stack([np.asarray(errors[width], np.float64) for width in widths], axis=1)  # (layers, widths)
    counts = np.asarray(weights, np.float64)
    spent = (counts[:, None] * np.asarray(widths)[None]).reshape(1, -1) / counts.sum()
    rows = np.repeat(np.arange(layers), len(widths))
    choices = csr_array((np.ones(cost.size), (rows, np.arange(cost.size))), shape=(layers, cost.size))
    optimum = milp(
        cost.reshape(-1) / max(cost.max(), 1e-300),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(choices, 1, 1), LinearConstraint(spent, ub=budget * (1 + 1e-9))],
        options={"mip_rel_gap": 0},
    )
    chosen = optimum.x.reshape(layers, len(widths)).argmax(axis=1)
    return [widths[i] for i in chosen]


def waterfilled(
    weights: Sequence[int], errors: Sequence[float], budget: float, narrow: float, wide: float
) -> list[float]:
    """Widths in hundredths of a bit from `narrow` to `wide`. `errors` are what `budget` bits leave in each layer.

    `weights` are the layers' numbers of weights. Without limits, and with all of the differences followed, they would
    minimize Σ e_l · 4^(budget − b(l)): b(l) = ½ · log2(e_l / n_l) plus a constant. Raises OptionError for a budget
    outside the limits.
    """
    _check(narrow, wide, budget)
    wishes = [
        0.5 * _TRUST * math.log2(max(error / count, _LEAST)) for error, count in zip(errors, weights, strict=True)
    ]

    def widths(level: float) -> list[float]:
        return [math.floor(100 * min(max(level + wish, narrow), wide) + 1e-9) / 100 for wish in wishes]

    total = sum(weights)
    low, high = narrow - max(wishes), wide - min(wishes)
    for _ in range(60):
        middle = (low + high) / 2
        spent = sum(count * width for count, width in zip(weights, widths(middle), strict=True))
        low, high = (middle, high) if spent <= budget * total * (1 + 1e-9) else (low, middle)
    return widths(low)


def _check(narrow: float, wide: float, budget: float) -> None:
    if not narrow <= budget <= wide:
        raise OptionError(
            f"a budget of {budget:g} bits per weight is outside {narrow} to {wide}, the range of the possible widths: "
            "choose a budget in this range"
        )
