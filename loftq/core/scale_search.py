"""Search for the scales under which rounding each block to the nearest levels leaves the least weighted error.

A scale that reaches a block's largest magnitude spends levels on a single value. The search tries the factors f from
0.4 to 1.05 in steps of 0.025 for each block, and takes the one that minimizes

    Σ_j h_j (w_j − q(w_j; f · extent))²,      h = diag H (in,) where H is the mean of x xᵀ, or h = 1,

where q rounds under scales and zero-points as they are stored (this is the search for clipped ranges of GPTQ's authors
and of AWQ, arXiv 2306.00978, section 4). f = 1 is among the factors, so the search makes no block worse. Double
quantization, under which blocks depend on each other, is applied after the search, to the scales that it chose.
"""

from __future__ import annotations

import numpy as np
import torch

from loftq.core.grid import Quantizer
from loftq.core.kernels import dispatch
from loftq.core.kernels.compiled import TILE, TINY, flat, for_block, over_blocks
from loftq.core.kernels.nearest import Levels, nearest
from loftq.core.scales import Scales

FACTORS = tuple(n / 40 for n in sorted(range(16, 43), key=lambda n: abs(n - 40)))  # on a tie the nearest to 1 wins
_ZERO, _ONE = np.float32(0), np.float32(1)


def search(weight: torch.Tensor, quantizer: Quantizer, importance: torch.Tensor | None = None) -> Scales:
    """Scales of `weight` (out, in), float32, as they will be read back; `importance` is h (in,), at least 0."""
    extent = quantizer.extent(weight)
    measure = _compiled if dispatch.on_cpu(weight) else _torch
    levels = Levels.of(quantizer.levels)
    if importance is None:
        importance = weight.new_ones(weight.shape[1])
    block = quantizer.block_size
    step = dispatch.step(block)
    factors = torch.tensor(FACTORS, device=weight.device)
    best_factors = []
    for part in range(0, weight.numel(), step):
        values = weight.view(-1)[part : part + step]
        reach = extent[..., part // block : (part + step) // block]
        candidates = [quantizer.covering(reach, factor, nested=False) for factor in factors]
        scales = torch.stack([each.values for each in candidates])  # (factors, blocks)
        shifts = torch.stack([each.offsets for each in candidates])
        best_factors.append(measure(values, importance.float(), part, levels, scales, shifts))
    return quantizer.covering(extent, factors[torch.cat(best_factors)])


def _torch(
    values: torch.Tensor,
    importance: torch.Tensor,
    start: int,
    levels: Levels,
    scales: torch.Tensor,
    shifts: torch.Tensor,
) -> torch.Tensor:
    """Index of the best row of `scales` and `shifts` (factors, blocks) for each block: int64 (blocks,).

    `values` are the part of a weight that begins at value `start`; `importance` (in,) holds for each of its rows.
    """
    blocks = values.view(scales.shape[1], -1)  # (blocks, block_size)
    at = torch.arange(start, start + values.numel(), device=values.device) % len(importance)
    weights = importance[at].view_as(blocks)
    table = levels.values.to(values.device)
    errors = torch.empty_like(scales)
    for error, scale, shift in zip(errors, scales.unsqueeze(2), shifts.unsqueeze(2), strict=True):
        inverse = 1 / torch.where(scale.abs() > 1e-38, scale, 1e-38)
        rounded = table[levels.places((blocks - shift) * inverse)] * scale + shift
        torch.sum((blocks - rounded).square_().mul_(weights), dim=1, out=error)
    return errors.argmin(dim=0)


def _compiled(
    values: torch.Tensor,
    importance: torch.Tensor,
    start: int,
    levels: Levels,
    scales: torch.Tensor,
    shifts: torch.Tensor,
) -> torch.Tensor:
    best = torch.zeros(scales.shape[1], dtype=torch.int64)
    block = values.numel() // len(best)
    boundaries, table, _ = levels.arrays()
    arrays = (flat(values), flat(importance), start, scales.numpy(), shifts.numpy(), boundaries, table, flat(best))
    loop = for_block(_search, block)
    over_blocks(len(best), block, lambda first, last: loop(*arrays, first, last))
    return best


def _search(  # type: ignore[no-untyped-def]
    x, importance, start, scales, shifts, boundaries, levels, best, first, last, block=64
):
    step = max(TILE // block, 1)
    unit, rounded = np.empty(step * block, np.float32), np.empty(step * block, np.float32)
    weights, least = np.empty(step * block, np.float32), np.empty(step, np.float32)
    low, high = levels[0], levels[-1]
    for tile in range(first, last, step):
        end = min(tile + step, last)
        n = (end - tile) * block
        column = (start + tile * block) % importance.shape[0]
        for j in range(n):
            weights[j] = importance[column]
            column = column + 1 if column + 1 < importance.shape[0] else 0
        least[:] = np.inf
        for f in range(scales.shape[0]):
            for b in range(tile, end):
                values, scaled = x[b * block : (b + 1) * block], unit[(b - tile) * block : (b - tile + 1) * block]
                shift = shifts[f, b]
                inverse = _ONE / (scales[f, b] if abs(scales[f, b]) > TINY else TINY)
                for j in range(block):
                    scaled[j] = (values[j] - shift) * inverse
            nearest(unit[:n], boundaries, levels, low, high, rounded[:n])
            for b in range(tile, end):
                at = slice((b - tile) * block, (b - tile + 1) * block)
                values, level, weight = x[b * block : (b + 1) * block], rounded[at], weights[at]
                scale, shift = scales[f, b], shifts[f, b]
                total = _ZERO
                for j in range(block):
                    error = values[j] - (level[j] * scale + shift)
                    total += weight[j] * error * error
                if total < least[b - tile]:
                    least[b - tile], best[b] = total, f
