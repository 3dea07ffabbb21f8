"""The level nearest to a value that is divided by its scale, for any codebook.

With boundaries halfway between neighbouring levels l_0 < l_1 < …, the place of x is

    codebooks:  #{ boundaries below x }             integers:  round(x), ties to even, within the levels, less l_0.

These are the rules of `blockwise` and of `affine`, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loftq.core.kernels.compiled import flat, strict


@strict
def nearest(units, boundaries, names, low, high, out):  # type: ignore[no-untyped-def]
    """The levels nearest to `units`, by what `names` calls them: their values, or their places."""
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
    """Levels float32, ascending, and what decides between them.

    `boundaries` is empty for whole numbers. They are padded to an even count, and levels by one, for the loops.
    """

    values: torch.Tensor
    boundaries: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> Levels:
        """From a codebook."""
        if bool((values.diff() == 1).all()):
            return cls(values, values[:0])
        midpoints = (values[:-1] + values[1:]) / 2
        return cls(torch.cat([values, values[-1:]]), torch.cat([midpoints, torch.tensor([torch.inf])]))

    @property
    def bits(self) -> int:
        """Bits a code."""
        return len(self.values).bit_length() - 1

    def places(self, units: torch.Tensor) -> torch.Tensor:
        """The codes nearest to values over scales: int32 or int64, of their shape."""
        if len(self.boundaries) == 0:
            low, high = float(self.values[0]), float(self.values[-1])
            return units.round().clamp_(low, high).sub_(low).int()
        return torch.bucketize(units, self.boundaries.to(units.device), out_int32=True)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boundaries, levels, and the levels' places, as the compiled loops take them."""
        return flat(self.boundaries), flat(self.values), np.arange(len(self.values), dtype=np.float32)
