"""The error that a quantized weight and its adapter leave, computed so that a small one is right.

    ‖E‖² = ‖W − Q − s·B·A‖²,   or in a metric with the root R   ‖E R‖².

Near full rank, E is a millionth of W or less. A difference of two squared norms, as in ‖W − Q‖² − ‖s·B·A‖², has lost
all digits of it by then, and so has a product in float32. Here the difference itself is computed in float64, from the
values that are stored, some rows at a time.
"""

from __future__ import annotations

import torch

from loftq.core.kernels import dispatch
from loftq.core.pooled import delta

CANCELLED = 0.005  # part of a squared norm: a smaller difference has lost too many digits, and is computed from values


def squared_error(
    weight: torch.Tensor,
    backbone: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float = 1.0,
    pool: int | None = None,
    root: torch.Tensor | None = None,
) -> float:
    """‖W − Q − ΔW‖² of float32 matrices (out, in), where ΔW is what the `factors` A, B of an adapter add.

    `pool` is the size of the pools of a QA-LoRA, None for a plain LoRA. With the `root` of a metric, (in,) or (in, in),
    the result is the squared error of the outputs.
    """
    total = 0.0
    a = b = None
    if factors is not None:
        a, b = (factor.double() for factor in factors)
    step = max(dispatch.CHUNK // weight.shape[1], 1)
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        error = weight[rows].double() - backbone[rows].double()
        if a is not None and b is not None:
            error -= delta(a, b[rows], scaling, pool)
        if root is not None:
            error = error * root.double() if root.dim() == 1 else error @ root.double()
        total += float(error.square().sum())
    return total
