"""QA-LoRA (arXiv 2309.14717): an adapter on pooled inputs, which folds into the zero-points of a group-wise backbone.

With pools of p consecutive inputs, L = in / p of them, peft's forward adds

    s · (L · mean_pool(x)) Aᵀ Bᵀ,   A (r, L), B (out, r),   so   ΔW[o, i] = C[o, i div p],   C = s · (L / p) · B A.

(The paper's factor is 1, its authors' code has 1 / p: peft's L / p is the one that stock loaders apply.) ΔW is
constant within a pool. Where a pool is made of whole quantization groups with W~ = scale · level + shift,

    shift' = shift + C

is an exact merge: codes and scales stay. As a plain LoRA, the same adapter is A_full = (L / p) · A with each column
repeated p times.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from loftq.core.affine import AffineWeight
from loftq.errors import OptionError


def factor(columns: int, pool: int) -> float:
    """L / p: what peft's forward puts before B A, beside the scaling, for an input of `columns`."""
    return columns / pool / pool


def correction(a: torch.Tensor, b: torch.Tensor, scaling: float, pool: int) -> torch.Tensor:
    """C (out, L), what an adapter A (r, L), B (out, r) adds to the weights of each pool."""
    return scaling * factor(a.shape[1] * pool, pool) * (b @ a)


def spread(pooled: torch.Tensor, pool: int) -> torch.Tensor:
    """ΔW (out, in) of C (out, L)."""
    return pooled.repeat_interleave(pool, dim=1)


def delta(a: torch.Tensor, b: torch.Tensor, scaling: float, pool: int | None) -> torch.Tensor:
    """ΔW (out, in), what an adapter adds to a weight: on inputs pooled by `pool`, or a plain LoRA."""
    return scaling * (b @ a) if pool is None else spread(correction(a, b, scaling, pool), pool)


def plain_lora(a: torch.Tensor, pool: int) -> torch.Tensor:
    """The A (r, in) with which a plain LoRA of the same B and scaling computes the same as A (r, L) does pooled."""
    return spread(a * factor(a.shape[1] * pool, pool), pool)


def merge_correction(weight: AffineWeight, pooled: torch.Tensor) -> AffineWeight:
    """The weight with C (out, L) in its shifts, codes and scales as they are. A pool must be whole groups."""
    return replace(weight, shifts=merge_shifts(weight.shifts, pooled))


def merge_shifts(shifts: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Shifts (out, groups) with C (out, L) in them."""
    groups, pools = shifts.shape[1], pooled.shape[1]
    if groups % pools:
        raise OptionError(f"{pools} pools are not made of whole groups, of which there are {groups}")
    return shifts + spread(pooled.to(shifts.dtype), groups // pools)
