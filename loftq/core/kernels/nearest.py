"""Search for the level nearest to a value divided by its scale, for any codebook.

With boundaries halfway between neighbouring levels l_0 < l_1 < …, the place of x among the levels is

    codebooks:  #{ boundaries below x }             integers:  round(x), ties to even, within the levels, minus l_0.

These rules agree with those of `blockwise` and `affine` to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loftq.core.kernels.compiled import flat, strict


@strict
def nearest(units, boundaries, names, low, high, out):  # type: ignore[no-untyped-def]
    """Write the name of the level nearest to each of `units` to `out`. `names` are the levels' values or places."""
    count = units.shape[0]
    if boundaries.shape[0] == 0:
        lift = names[0] - low
        for r in range(count):
            level = np.rint(units[r])
            level = low if level < low else level
            out[r] = (high if level > high else level) + lift
        return
    for r in range(count):
        out[r] = names[0]
    for k in range(0, boundaries.shape[0], 2):
        left, right = boundaries[k], boundaries[k + 1]
        below, above = names[k + 1], names[k + 2]
        for r in range(count):
            name = below if units[r] > left else out[r]
            out[r] = above if units[r] > right else name


@dataclass(frozen=True)
class Levels:
    """Levels float32, ascending, and the boundaries between them.

    For whole numbers `boundaries` is empty. Otherwise, for the compiled loops, boundaries are padded to an even count
    and levels by one.
    """

    values: torch.Tensor
    boundaries: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> Levels:
        """The levels of a codebook and their boundaries."""
        if bool((values.diff() == 1).all()):
            return cls(values, values[:0])
        midpoints = (values[:-1] + values[1:]) / 2
        return cls(torch.cat([values, values[-1:]]), torch.cat([midpoints, torch.tensor([torch.inf])]))

    @property
    def bits(self) -> int:
        """Number of bits of a code."""
        return len(self.values).bit_length() - 1

    def places(self, units: torch.Tensor) -> torch.Tensor:
        """The codes of the levels nearest to values divided by their scales: int32 of the same shape."""
        if len(self.boundaries) == 0:
            low, high = float(self.values[0]), float(self.values[-1])
            return units.round().clamp_(low, high).sub_(low).int()
        return torch.bucketize(units, self.boundaries.to(units.device), out_int32=True)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boundaries, levels, and the levels' places, in the form that the compiled loops take."""
        return flat(self.boundaries), flat(self.values), np.arange(len(self.values), dtype=np.float32)
