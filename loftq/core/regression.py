"""Least-squares fit of scales and shifts to a layer's outputs, for given codes, jointly for all groups of a row.

With levels l, a row of W~ = scale_g · l + shift_g is linear in 2 G unknowns for G groups. In the metric of H (`metric`)
they solve the normal equations

    [ Lᵀ H L   Lᵀ H S ] [scale]   [ Lᵀ H w ]        L (in, G): the levels of each group in a column of its own,
    [ Sᵀ H L   Sᵀ H S ] [shift] = [ Sᵀ H w ],       S (in, G): ones in the same places.

Where the scale determines the shift (whole zero-points: shift = −l₀ · scale), L holds l − l₀ and S is left out. If all
levels of a group are equal, the equations are singular: a ridge of 1e-9 of the diagonal selects one of their solutions.
"""

from __future__ import annotations

import torch

_RIDGE = 1e-9
_VALUES = 1 << 24  # how many float64 values of the equations are in memory at a time


def fit(
    weight: torch.Tensor, levels: torch.Tensor, moment: torch.Tensor, block: int, *, shifted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and shifts, float64 (out, in / block), for float levels (out, in). Shifts are zero unless `shifted`."""
    groups = weight.shape[1] // block
    sums = moment.double().view(groups, block, groups, block).sum(dim=(1, 3))  # Sᵀ H S
    rows = max(_VALUES // (4 * groups * groups), 1)
    fits = [
        _fit_rows(some.double(), places.double(), moment.double(), sums, block, shifted)
        for some, places in zip(torch.split(weight, rows), torch.split(levels, rows), strict=True)
    ]
    return torch.cat([scales for scales, _ in fits]), torch.cat([shifts for _, shifts in fits])


def _fit_rows(
    weight: torch.Tensor, levels: torch.Tensor, moment: torch.Tensor, sums: torch.Tensor, block: int, shifted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, groups = len(weight), len(sums)
    size = 2 * groups if shifted else groups
    matrix = weight.new_empty(rows, size, size)
    for g in range(groups):
        inputs = slice(g * block, (g + 1) * block)
        product = levels[:, inputs] @ moment[inputs]  # (rows, in): H times column g of L
        matrix[:, g, :groups] = (product * levels).view(rows, groups, block).sum(dim=2)
        if shifted:
            matrix[:, g, groups:] = product.view(rows, groups, block).sum(dim=2)
    outputs = weight @ moment
    wanted = (outputs * levels).view(rows, groups, block).sum(dim=2)
    if shifted:
        matrix[:, groups:, :groups] = matrix[:, :groups, groups:].transpose(1, 2)
        matrix[:, groups:, groups:] = sums
        wanted = torch.cat([wanted, outputs.view(rows, groups, block).sum(dim=2)], dim=1)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(dim=1, keepdim=True) + torch.finfo(torch.float64).tiny
    solution = torch.linalg.solve(matrix, wanted)
    return solution[:, :groups], solution[:, groups:] if shifted else torch.zeros_like(solution)


def pooled_fit(residual: torch.Tensor, moment: torch.Tensor, pool: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best correction that is constant in pools, C* = E H Sᵀ (S H Sᵀ)⁻¹, float64 (out, in / pool), and S H Sᵀ."""
    pools = residual.shape[1] // pool
    h = moment.double()
    sums = h.view(pools, pool, pools, pool).sum(dim=(1, 3))
    product = (residual.double() @ h).view(len(residual), pools, pool).sum(dim=2)  # E H Sᵀ
    return torch.linalg.solve(sums, product, left=False), sums
