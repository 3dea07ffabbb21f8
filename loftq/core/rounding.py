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

Columns are processed in panels. One matrix product carries the errors of other columns into a panel; within the panel,
columns follow one another in a compiled loop on the CPU (`kernels.rounding`) and in a kernel on a GPU
(`kernels.gpu_rounding`). Rows do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq.core.grid import Quantizer
from loftq.core.kernels import dispatch, rounding
from loftq.core.kernels.nearest import Levels
from loftq.core.packing import paired
from loftq.core.scales import Scales
from loftq.errors import OptionError

_PANEL = 128  # columns in a panel
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
    coefficients, _ = repayments(moment, directions)
    errors = weight.new_zeros(weight.shape[::-1])
    return _round(weight, quantizer, scales, coefficients, errors, triangular=True)


def descend(
    target: torch.Tensor,
    quantizer: Quantizer,
    scales: Scales,
    codes: torch.Tensor,
    moment: torch.Tensor,
    rounds: int = 1,
) -> torch.Tensor:
    """Improve `codes` of `target` (out, in) by `rounds` passes of coordinate descent under `scales`: the new codes.

    `moment` is H (in, in), symmetric with a diagonal above 0.
    """
    coefficients = (moment / moment.diagonal()).float().fill_diagonal_(0)
    errors = (target - quantizer.decode(codes, scales, target.shape)).T.contiguous()
    for _ in range(rounds):
        codes = _round(target, quantizer, scales, coefficients, errors, triangular=False)
    return codes


def output_squared_norm(error: torch.Tensor, moment: torch.Tensor) -> float:
    """tr(E H Eᵀ) of E (out, in), with products in H's dtype and their sum in float64."""
    total = 0.0
    for rows in torch.split(error, max(dispatch.CHUNK // error.shape[1], 1)):
        rows = rows.to(moment.dtype)
        total += float((rows @ moment).mul_(rows).sum(dtype=torch.float64))
    return total


def _relieved(moment: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    basis, _ = torch.linalg.qr(directions)
    projected = basis.T @ moment  # (r, in)
    inner = projected @ basis
    inner.diagonal().add_(_DAMPING * moment.diagonal().mean())
    half = torch.linalg.solve_triangular(_cholesky(inner), projected, upper=False)
    relieved: torch.Tensor = moment - half.T @ half
    return relieved


def repayments(moment: torch.Tensor, directions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """U − I, float32 (in, in), and D, float64 (in,), for U D Uᵀ = H, or = S if an adapter will correct `directions`.

    Raises OptionError where H is not positive definite.
    """
    metric = moment.double() if directions is None else _relieved(moment.double(), directions.double())
    root = _cholesky(metric.flip(0, 1)).flip(0, 1)  # the factor is lower triangular, so H is reversed, and U after
    diagonal = root.diagonal().clone()
    return root.div_(diagonal).float().triu_(1), diagonal.square_()


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    lower: torch.Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise OptionError(f"the second moment {tuple(matrix.shape)} is not positive definite: add more damping to it")
    return lower


def _round(
    target: torch.Tensor,
    quantizer: Quantizer,
    scales: Scales,
    coefficients: torch.Tensor,
    errors: torch.Tensor,
    *,
    triangular: bool,
) -> torch.Tensor:
    """Round all columns once and return their codes.

    `errors` (in, out) are those of the codes before (or zeros), and become those of the new codes.
    """
    columns = errors.shape[0]
    levels = Levels.of(quantizer.levels)
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    loop = _sweep_for(target)
    for start in range(0, columns, _PANEL):
        panel = slice(start, min(start + _PANEL, columns))
        goal = target[:, panel].T.contiguous()  # (width, out)
        sources = start if triangular else columns  # under feedback, the errors from here on are still zero
        x = torch.addmm(goal, coefficients[:sources, panel].T, errors[:sources])
        within = coefficients[panel, panel]
        panel_codes = loop(
            x, goal, errors[panel], within, levels, scales.values, scales.offsets, start, columns, quantizer.block_size
        )
        codes[:, panel] = panel_codes.T
    return paired(codes.view(-1), levels.bits)


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
