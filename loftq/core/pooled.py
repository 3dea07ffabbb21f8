"""QA-LoRA (arXiv 2309.14717): an adapter on pooled inputs, which can be merged into the zero-points of a backbone.

With L = in / p pools of p consecutive inputs, peft's forward adds

    s · (L · mean_pool(x)) Aᵀ Bᵀ,   A (r, L), B (out, r),   so   ΔW[o, i] = C[o, i div p],   C = s · (L / p) · B A.

(The paper's factor is 1, and its authors' code has 1 / p; stock loaders apply peft's L / p.) ΔW is constant within a
pool. If a pool consists of whole quantization groups with W~ = scale · level + shift,

    shift' = shift + C

is an exact merge: codes and scales do not change. The same adapter as a plain LoRA is A_full = (L / p) · A with each
column repeated p times.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from loftq.core.affine import AffineWeight
from loftq.errors import OptionError


def factor(columns: int, pool: int) -> float:
    """L / p, the factor that peft's forward applies to B A besides the scaling, for `columns` inputs."""
    return columns / pool / pool


def correction(a: torch.Tensor, b: torch.Tensor, scaling: float, pool: int) -> torch.Tensor:
    """C (out, L), the number that an adapter A (r, L), B (out, r) adds to each weight of a pool."""
    return scaling * factor(a.shape[1] * pool, pool) * (b @ a)


def spread(pooled: torch.Tensor, pool: int) -> torch.Tensor:
    """ΔW (out, in) from C (out, L): each column repeated for the inputs of its pool."""
    return pooled.repeat_interleave(pool, dim=1)


def delta(a: torch.Tensor, b: torch.Tensor, scaling: float, pool: int | None) -> torch.Tensor:
    """ΔW (out, in), which an adapter adds to a weight: a QA-LoRA with pools of `pool` inputs, a plain LoRA for None."""
    return scaling * (b @ a) if pool is None else spread(correction(a, b, scaling, pool), pool)


def plain_lora(a: torch.Tensor, pool: int) -> torch.Tensor:
    """The A (r, in) of the plain LoRA, with the same B and scaling, that computes the same as A (r, L) on pools."""
    return spread(a * factor(a.shape[1] * pool, pool), pool)


def merge_correction(weight: AffineWeight, pooled: torch.Tensor) -> AffineWeight:
    """Add C (out, L) to a weight's shifts; codes and scales do not change.

    Raises OptionError unless a pool consists of whole groups.
    """
    return replace(weight, shifts=merge_shifts(weight.shifts, pooled))


def merge_shifts(shifts: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Add C (out, L) to shifts (out, groups). Raises OptionError unless a pool consists of whole groups."""
    groups, pools = shifts.shape[1], pooled.shape[1]
    if groups % pools:
        raise OptionError(
            f"{pools} pools are not made of whole groups, since there are {groups} groups: "
            "the number of groups must be a multiple of the number of pools"
        )
    return shifts + spread(pooled.to(shifts.dtype), groups // pools)
