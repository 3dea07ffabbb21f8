"""Rounding that knows the second moment of a layer's inputs, on a grid whose scales stay.

With H the mean of x xᵀ (in, in), the outputs of W (out, in) and of its rounding Q differ by tr(E H Eᵀ), E = W − Q.
Columns are rounded in their order, each from where the errors of the others want it:

    x_j = W_j + Σ_i E_i C_ij,      Q_j = the level nearest to x_j,      E_j = W_j − Q_j.

Error feedback (GPTQ, arXiv 2210.17323). With H = U D Uᵀ, U unit upper triangular, the error is Σ_j D_j (x_j − Q_j)²
for C = U − I: each column repays what those before it owe. GPTQ writes the same through the Cholesky factor of H⁻¹,
whose rows are those of U⁻¹ but for their length (arXiv 2307.13304, theorem 6); U itself needs no inverse of H.

Descent. With C_ij = H_ij / H_jj but for C_jj = 0, x_j is where the error as a function of column j alone is least,
given all the others as they stand: no step makes the error larger.

Directions V (in, r) that an adapter will correct: for the best B, E − B Vᵀ costs tr(E S Eᵀ) with

    S = H − H V (Vᵀ H V + λ I)⁻¹ Vᵀ H,      λ = 0.01 · mean(diag H), V orthonormal,

so feedback under S is feedback under [[H, HV], [VᵀH, VᵀHV + λI]] with r last columns that are never rounded.

Columns go in panels: what a panel owes to columns outside is one product, what lies within goes column by column, on
the CPU in a compiled loop (`kernels.rounding`), on a GPU in a kernel (`kernels.gpu_rounding`). Rows do not meet.
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

_PANEL = 128  # columns
_DAMPING = 0.01  # of directions that an adapter will correct


def feedback(
    weight: torch.Tensor,
    quantizer: Quantizer,
    scales: Scales,
    moment: torch.Tensor,
    directions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes of `weight` (out, in), float32, by error feedback under `scales`; as `quantizer.encode` gives them.

    `moment` is H (in, in), symmetric and positive definite (damped); of `directions` (in, r) only the span counts.
    Raises OptionError where H is not positive definite.
    """
    metric = moment.double() if directions is None else _relieved(moment.double(), directions.double())
    coefficients = _repayments(metric)
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
    """Codes that come nearer to `target` (out, in) than `codes`, by `rounds` of coordinate descent under `scales`.

    `moment` is H (in, in), symmetric with a diagonal above 0.
    """
    coefficients = (moment / moment.diagonal()).float().fill_diagonal_(0)
    errors = (target - quantizer.decode(codes, scales, target.shape)).T.contiguous()
    for _ in range(rounds):
        codes = _round(target, quantizer, scales, coefficients, errors, triangular=False)
    return codes


def output_squared_norm(error: torch.Tensor, moment: torch.Tensor) -> float:
    """tr(E H Eᵀ) of E (out, in), with products in H's dtype, summed in float64."""
    total = 0.0
    for rows in torch.split(error, max(dispatch.CHUNK // error.shape[1], 1)):
        rows = rows.to(moment.dtype)
        total += float((rows @ moment).mul_(rows).sum(dtype=torch.float64))
    return total


def _relieved(moment: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    basis, _ = torch.linalg.qr(directions)
    seen = basis.T @ moment  # (r, in)
    inner = seen @ basis
    inner.diagonal().add_(_DAMPING * moment.diagonal().mean())
    half = torch.linalg.solve_triangular(_cholesky(inner), seen, upper=False)
    relieved: torch.Tensor = moment - half.T @ half
    return relieved


def _repayments(moment: torch.Tensor) -> torch.Tensor:
    """U − I of H = U D Uᵀ: float32. Cholesky's factor is lower: that of H turned round, turned back."""
    root = _cholesky(moment.flip(0, 1)).flip(0, 1)
    return root.div_(root.diagonal().clone()).float().triu_(1)


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    lower: torch.Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise OptionError(f"the second moment {tuple(matrix.shape)} is not positive definite: damp it more")
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
    """One pass over all columns. `errors` (in, out), those of the codes so far (or zeros), become those of the new."""
    columns = errors.shape[0]
    levels = Levels.of(quantizer.levels)
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    loop = _sweep_for(target)
    for start in range(0, columns, _PANEL):
        panel = slice(start, min(start + _PANEL, columns))
        goal = target[:, panel].T.contiguous()  # (width, out)
        known = start if triangular else columns  # errors further on are zero yet
        x = torch.addmm(goal, coefficients[:known, panel].T, errors[:known])
        within = coefficients[panel, panel]
        found = loop(
            x, goal, errors[panel], within, levels, scales.values, scales.offsets, start, columns, quantizer.block_size
        )
        codes[:, panel] = found.T
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
    """Round a panel of columns one by one: codes uint8 (width, out).

    `x` (width, out) is where errors outside the panel, and those that columns of it had, want its columns;
    `coefficients` (width, width) are its own. `start` of `columns` is its first. Changes `errors` (width, out), and x.
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
