"""Rounding that uses the second moment of a layer's inputs, under scales that stay as they are.

With H the mean of x xᵀ (in, in), the squared difference between the outputs of W (out, in) and of its rounding Q is
tr(E H Eᵀ), E = W − Q. Columns are rounded one after the other. Each is first shifted to make up for the errors of the
others:

    x_j = W_j + Σ_i E_i C_ij,      Q_j = the level nearest to x_j,      E_j = W_j − Q_j.

Error feedback (GPTQ, arXiv 2210.17323). With H = U D Uᵀ, U unit upper triangular, the error is Σ_j D_j (x_j − Q_j)²
for C = U − I: each column makes up for the errors of those before it. GPTQ computes the same from the Cholesky factor
of H⁻¹, whose rows are those of U⁻¹ up to their length (arXiv 2307.13304, theorem 6); U itself needs no inverse of H.

Descent. With C_ij = H_ij / H_jj and C_jj = 0, x_j is where the error, as a function of column j alone, is least while
all other columns stay as they are: no step makes the error larger.

Directions V (in, r) that an adapter will correct. With the best B, the error of E − B Vᵀ is tr(E S Eᵀ), where

    S = H − H V (Vᵀ H V + λ I)⁻¹ Vᵀ H,      λ = 0.01 · mean(diag H), V orthonormal,

so feedback under S is feedback under [[H, HV], [VᵀH, VᵀHV + λI]] with r last columns that are never rounded.

Columns are processed in panels, within which they follow one another in a compiled loop on the CPU
(`kernels.rounding`) and in a kernel on a GPU (`kernels.gpu_rounding`). Under feedback one matrix product carries the
errors of earlier columns into a panel. A descent changes few codes: 6 % of NF4's in the first round, and fewer in each
later one. So all x_j are computed once, and each change is added to those of other columns; on a CPU, codes that stay
cost nothing there. Rows do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch

from loftq.core.grid import Quantizer
from loftq.core.kernels import dispatch, rounding
from loftq.core.kernels.nearest import Levels
from loftq.core.packing import paired, single
from loftq.core.scales import Scales
from loftq.errors import OptionError

_PANEL = 128  # columns in a panel
_CACHED = 1 << 21  # values of what is wanted that are kept in a CPU's cache
_DAMPING = 0.01  # λ relative to the mean of diag H, for directions that an adapter will correct


def feedback(
    weight: torch.Tensor,
    quantizer: Quantizer,
    scales: Scales,
    moment: torch.Tensor,
    directions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes of `weight` (out, in), float32, by error feedback under `scales`, in the form of `quantizer.encode`.

    `moment` is H (in, in), symmetric and positive definite (damped). Only the span of `directions` (in, r) matters.
    Raises OptionError where H is not positive definite.
    """
    return feed(weight, quantizer, scales, repayments(moment, directions)[0])


def feed(weight: torch.Tensor, quantizer: Quantizer, scales: Scales, coefficients: torch.Tensor) -> torch.Tensor:
    """Codes of `weight` by error feedback with the coefficients U − I of `repayments`."""
    errors = weight.new_zeros(weight.shape[::-1])
    levels = Levels.of(quantizer.levels)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    loop = _sweep_for(weight)
    for panel in _panels(weight.shape[1]):
        goal = weight[:, panel].T.contiguous()  # (width, out)
        sources = slice(panel.start)  # the errors from here on are still zero
        x = torch.addmm(goal, coefficients[sources, panel].T, errors[sources])
        place = (scales.values, scales.offsets, panel.start, weight.shape[1], quantizer.block_size)
        codes[:, panel] = loop(x, goal, errors[panel], coefficients[panel, panel], levels, *place).T
    return paired(codes.view(-1), levels.bits)


def descend(
    target: torch.Tensor,
    quantizer: Quantizer,
    scales: Scales,
    codes: torch.Tensor,
    moment: torch.Tensor,
    rounds: int = 1,
    pulls: torch.Tensor | None = None,
) -> torch.Tensor:
    """Improve `codes` of `target` (out, in) by `rounds` passes of coordinate descent under `scales`: the new codes.

    `moment` is H (in, in), symmetric with a diagonal above 0. `pulls` are E H, if they are known; they are changed.
    """
    diagonal = moment.diagonal().float()
    coefficients = (moment.float() / diagonal).fill_diagonal_(0)
    rounded = quantizer.decode(codes, scales, target.shape)
    if pulls is None:
        wanted = torch.addmm(target, target - rounded, coefficients)
    else:
        wanted = pulls.div_(diagonal).add_(rounded)
    del rounded
    levels = Levels.of(quantizer.levels)
    found = single(codes, levels.bits).view(target.shape).clone()
    step = rounding.descend_panel if dispatch.on_cpu(target) else descend_panel
    for rows in _tiles(target, quantizer.block_size):
        for left in reversed(range(rounds)):
            for panel in _panels(target.shape[1]):
                carried = 0 if left else panel.stop  # earlier columns are not rounded again
                place = scales.values, scales.offsets, panel, quantizer.block_size, rows.start, carried
                step(wanted[rows], found[rows], coefficients[panel], levels, *place)
    return paired(found.view(-1), levels.bits)


def descend_panel(
    wanted: torch.Tensor,
    codes: torch.Tensor,
    coefficients: torch.Tensor,
    levels: Levels,
    scales: torch.Tensor,
    shifts: torch.Tensor,
    panel: slice,
    block: int,
    row: int,
    carried: int,
) -> None:
    """Round a panel of columns of some rows once, and pass the changes on to the columns from `carried` on.

    `wanted` and `codes` are (rows, in), and `row` is the number of the first row in the weight. `coefficients`
    (width, in) are those of the panel. Changes what is wanted, and the codes.
    """
    rows, columns = wanted.shape
    own = slice(row * columns // block, (row + rows) * columns // block)
    table = levels.values.to(wanted.device)
    blocks = (torch.arange(rows, device=wanted.device) * columns).unsqueeze(1)
    blocks = (blocks + torch.arange(panel.start, panel.stop, device=wanted.device)) // block  # (rows, width)
    before = table[codes[:, panel].int()] * scales[own][blocks] + shifts[own][blocks]
    x, goal = (each.T.contiguous() for each in (wanted[:, panel], before))  # (width, rows)
    errors = torch.zeros_like(x)
    within = coefficients[:, panel].contiguous()
    found = _sweep_for(wanted)(x, goal, errors, within, levels, scales[own], shifts[own], panel.start, columns, block)
    codes[:, panel] = found.T
    wanted[:, carried:].addmm_(errors.T, coefficients[:, carried:])


def _panels(columns: int) -> list[slice]:
    return [slice(start, min(start + _PANEL, columns)) for start in range(0, columns, _PANEL)]


def _tiles(target: torch.Tensor, block: int) -> list[slice]:
    """Rows that are descended together, whole blocks, and on a CPU few enough to stay in its cache."""
    rows, columns = target.shape
    whole = block // gcd(block, columns)  # rows in which blocks end where rows do
    step = max(_CACHED // columns // whole, 1) * whole if dispatch.on_cpu(target) else rows
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def output_squared_norm(error: torch.Tensor, moment: torch.Tensor) -> float:
    """tr(E H Eᵀ) of E (out, in), with products in H's dtype and their sum in float64."""
    total = 0.0
    for rows in torch.split(error, max(dispatch.CHUNK // error.shape[1], 1)):
        rows = rows.to(moment.dtype)
        total += float((rows @ moment).mul_(rows).sum(dtype=torch.float64))
    return total


def repayments(moment: torch.Tensor, directions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """U − I, float32 (in, in), and D, float64 (in,), for U D Uᵀ = H, or = S if an adapter will correct `directions`.

    Raises OptionError where H is not positive definite.
    """
    return repayments_of(rooted(moment, directions))


def rooted(moment: torch.Tensor, directions: torch.Tensor | None = None) -> torch.Tensor:
    """The root [U D^½, P] of H = U D Uᵀ + P Pᵀ, where P Pᵀ (in, r) is what an adapter will correct: float64.

    Raises OptionError where H is not positive definite.
    """
    exact = moment.double()
    size = len(exact)
    repaid = exact[:, :0] if directions is None else _repaid(exact, directions.double())
    rest = exact.flip(0, 1)  # reversed, because the factor is lower triangular, and U is upper
    if directions is not None:
        last_first = repaid.flip(0)
        rest.addmm_(last_first, last_first.T, alpha=-1)
    lower = _cholesky(rest)
    del rest
    root = exact.new_empty(size, size + repaid.shape[1])
    root[:, :size], root[:, size:] = lower.flip(0, 1), repaid
    return root


def repayments_of(root: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U − I and D, as `repayments` returns them, of a root from `rooted`."""
    upper = root[:, : len(root)]
    diagonal = upper.diagonal()
    return (upper / diagonal).float().triu_(1), diagonal.square()


def _repaid(moment: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """P (in, r), where P Pᵀ is what the directions take of H."""
    basis, _ = torch.linalg.qr(directions)
    projected = basis.T @ moment  # (r, in)
    inner = projected @ basis
    inner.diagonal().add_(_DAMPING * moment.diagonal().mean())
    half: torch.Tensor = torch.linalg.solve_triangular(_cholesky(inner), projected, upper=False)
    return half.T


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    lower: torch.Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise OptionError(f"the second moment {tuple(matrix.shape)} is not positive definite: add more damping to it")
    return lower


def _sweep_for(target: torch.Tensor) -> Callable[..., torch.Tensor]:
    if dispatch.on_cpu(target):
        return rounding.sweep
    if dispatch.on_gpu(target):
        from loftq.core.kernels import gpu_rounding

        return gpu_rounding.sweep
    return sweep_columns


def sweep_columns(
    x: torch.Tensor,
    target: torch.Tensor,
    errors: torch.Tensor,
    coefficients: torch.Tensor,
    levels: Levels,
    scales: torch.Tensor,
    shifts: torch.Tensor,
    start: int,
    columns: int,
    block: int,
) -> torch.Tensor:
    """Round a panel of columns one by one, and return their codes: uint8 (width, out).

    `x` (width, out) are the panel's columns, shifted for the errors of all columns before this call; `coefficients`
    (width, width) are those within the panel. The panel begins at column `start` of `columns`. Changes `errors`
    (width, out) and x.
    """
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    table = levels.values.to(x.device)
    first = torch.arange(x.shape[1], device=x.device) * columns + start  # of each row
    for j in range(len(x)):
        block_of = (first + j) // block
        scale, shift = scales[block_of], shifts[block_of]
        inverse = 1 / torch.where(scale.abs() > 1e-38, scale, 1e-38)
        place = levels.places((x[j] - shift) * inverse)
        error = target[j] - (table[place] * scale + shift)
        change = error - errors[j]
        errors[j], codes[j] = error, place
        x[j + 1 :] += change * coefficients[j, j + 1 :].unsqueeze(1)
    return codes
