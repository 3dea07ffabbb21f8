"""How many bits each layer gets under a budget of bits a weight.

With n_l weights in layer l, and e_lb the squared error that is left in it at b bits,

    minimize Σ e_l,b(l)   subject to   Σ n_l · b(l) ≤ budget · Σ n_l,

a knapsack with a choice of one width a layer, solved exactly as an integer program (HiGHS, through scipy). The
paper's own way (LoftQ, arXiv 2310.08659, section 4) needs no errors: the first layers get the most bits, the rest
the fewest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from loftq.errors import OptionError


def first(weights: Sequence[int], narrow: int, wide: int, budget: float) -> list[int]:
    """`wide` bits for as many layers from the first on as the budget allows, `narrow` for the others."""
    _check(narrow, wide, budget)
    left = (budget - narrow) * sum(weights) / (wide - narrow) * (1 + 1e-9)
    found = []
    for count in weights:
        left -= count
        found.append(wide if left >= 0 else narrow)
    return found


def least_error(weights: Sequence[int], errors: Mapping[int, Sequence[float]], budget: float) -> list[int]:
    """The width of each layer with which the summed errors are least. `errors` has those of all layers by width."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    widths = sorted(errors)
    _check(widths[0], widths[-1], budget)
    layers = len(weights)
    cost = np.stack([np.asarray(errors[width], np.float64) for width in widths], axis=1)  # (layers, widths)
    counts = np.asarray(weights, np.float64)
    spent = (counts[:, None] * np.asarray(widths)[None]).reshape(1, -1) / counts.sum()
    rows = np.repeat(np.arange(layers), len(widths))
    one = csr_array((np.ones(cost.size), (rows, np.arange(cost.size))), shape=(layers, cost.size))
    found = milp(
        cost.reshape(-1) / max(cost.max(), 1e-300),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(spent, ub=budget * (1 + 1e-9))],
        options={"mip_rel_gap": 0},
    )
    chosen = found.x.reshape(layers, len(widths)).argmax(axis=1)
    return [widths[i] for i in chosen]


def _check(narrow: float, wide: float, budget: float) -> None:
    if not narrow <= budget <= wide:
        raise OptionError(f"a budget of {budget:g} bits is outside {narrow} to {wide}, the widths there are")
