"""Properties of all solvers at full rank and at extreme scales. The oracle is the float64 error of what they return."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from grids import pairwise

from loftq.core import pooled
from loftq.core.grid import Grid
from loftq.core.metric import damped
from loftq.core.solvers.calibrated import solve_calibrated
from loftq.core.solvers.loftq import solve_loftq
from loftq.core.solvers.methods import METHODS
from loftq.core.solvers.pooled import solve_pooled
from loftq.core.solvers.pooled_calibrated import solve_pooled_calibrated
from loftq.core.solvers.solution import Solution, check_solution, unit_of
from loftq.errors import OptionError

ROWS, COLUMNS, POOL, SCALING = 48, 64, 32, 0.5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlier(value: float) -> torch.Tensor:
    weight = draw(ROWS, COLUMNS) * 0.02
    weight[3, 5] = value
    return weight


DUPLICATES = draw(ROWS // 2, COLUMNS // 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
WEIGHTS = {
    "usual": draw(ROWS, COLUMNS),
    "zeros": torch.zeros(ROWS, COLUMNS),
    "constant rows": draw(ROWS, 1).repeat(1, COLUMNS),
    "ones": torch.ones(ROWS, COLUMNS),
    "rank 1": torch.outer(draw(ROWS), draw(COLUMNS, seed=1)),
    "duplicates": DUPLICATES,
    "outlier 1e30": outlier(1e30),
    "outlier 1e38": outlier(1e38),
    "1e30": draw(ROWS, COLUMNS) * 1e30,
    "1e37": draw(ROWS, COLUMNS) * 1e37,
    "1e-30": draw(ROWS, COLUMNS) * 1e-30,
    "1e-37": draw(ROWS, COLUMNS) * 1e-37,
    "columns from 1e-30 to 1e30": draw(ROWS, COLUMNS) * torch.logspace(-30, 30, COLUMNS),
}
INPUTS = draw(200, COLUMNS, seed=2)
MOMENT = INPUTS.T @ INPUTS / 200
MOMENTS = {
    "usual": MOMENT,
    "zeros": MOMENT * 0,
    "rank 1": torch.ones(COLUMNS, COLUMNS),
    "1e30": MOMENT * 1e30,
    "1e-30": MOMENT * 1e-30,
}
GRIDS = [
    Grid("nf4", 32),
    Grid("nf2", 32, double_quant=True),
    Grid("int2", 32, zero_point="integer"),
    Grid("int4", 32, zero_point="float"),
    Grid("int8", 32, zero_point="symmetric"),
]


def check(weight: torch.Tensor, grid: Grid, solved: Solution, pool: int | None, moment: torch.Tensor | None) -> None:
    """All numbers are finite, and the final errors are those of the values."""
    quantizer = grid.quantizer(COLUMNS)
    check_solution(solved, quantizer, "layer")
    delta = pooled.delta(solved.a.double(), solved.b.double(), SCALING, pool)
    error = weight.double() - quantizer.decode(solved.codes, solved.scales, weight.shape).double() - delta
    norm = float(weight.double().norm())
    true = float(error.norm())
    assert abs(solved.trace.final - true) <= 1e-4 * true + 2e-7 * norm
    if moment is not None and solved.trace.outputs is not None:
        root = torch.linalg.cholesky(damped(moment))
        whole = float((weight.double() @ root).norm()) or 1.0
        reported = solved.trace.outputs.final / (solved.trace.outputs.weight or 1.0)
        assert abs(reported - float((error @ root).norm()) / whole) <= 1e-4 * reported + 2e-7


@pytest.mark.parametrize(
    ("kind", "grid", "dtype"), pairwise(list(WEIGHTS), GRIDS, [torch.float32, torch.float16]), ids=str
)
def test_solutions_without_text_are_finite_and_their_errors_true(kind: str, grid: Grid, dtype: torch.dtype) -> None:
    weight, quantizer = WEIGHTS[kind], grid.quantizer(COLUMNS, dtype)
    for rank in (1, ROWS):
        for iterations, svd in ((0, "krylov"), (2, "krylov"), (2, "exact")):
            solved = solve_loftq(weight, quantizer, rank, iterations, SCALING, svd=svd)
            check(weight, grid, solved, None, None)
    if grid.integer and grid.zero_point != "symmetric":
        for iterations in (0, 2):
            solved = solve_pooled(weight, quantizer, COLUMNS // POOL, iterations, SCALING, POOL)  # type: ignore[arg-type]
            check(weight, grid, solved, POOL, None)


@pytest.mark.parametrize(
    ("kind", "method", "rank"), pairwise(list(WEIGHTS), ["qera-approx", "qera", "cloq", "calibrated"], [4, ROWS])
)
def test_calibrated_solutions_are_finite_and_their_errors_true(kind: str, method: str, rank: int) -> None:
    weight = WEIGHTS[kind]
    moments = MOMENTS if kind in ("usual", "1e30", "constant rows") else {"usual": MOMENT}
    for moment in moments.values():
        for grid in (GRIDS[0], GRIDS[2]):
            quantizer = grid.quantizer(COLUMNS)
            solved = solve_calibrated(weight, quantizer, METHODS[method], moment, rank, 2, SCALING)
            check(weight, grid, solved, None, moment)
        pools = COLUMNS // POOL
        problem = (weight, GRIDS[2].quantizer(COLUMNS), METHODS[method], moment, pools, 2, SCALING, POOL)
        check(weight, GRIDS[2], solve_pooled_calibrated(*problem), POOL, moment)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
def test_constant_rows_at_full_rank_leave_nothing(seed: int) -> None:
    """A weight of rank 1, whose residual has one direction: the others must not become NaN."""
    weight = draw(128, 1, seed=seed).expand(128, 64).clone()
    quantizer = Grid("int2", 64, zero_point="integer").quantizer(64)
    solved = solve_loftq(weight, quantizer, 64, 1, 1.0)
    check_solution(solved, quantizer, "layer")
    assert solved.trace.final <= 1e-6 * float(weight.norm())


@pytest.mark.parametrize("size", [(160, 192), (192, 160)])
def test_a_krylov_space_that_is_larger_than_the_residuals_rank_stays_finite(size: tuple[int, int]) -> None:
    weight = torch.outer(draw(size[0]), draw(size[1], seed=1))
    for iterations in (1, 3):
        solved = solve_loftq(weight, Grid("nf4", 32).quantizer(size[1]), 4, iterations, 1.0)
        check_solution(solved, Grid("nf4", 32).quantizer(size[1]), "layer")


@pytest.mark.parametrize("exponent", [-60, 60, 100])
def test_a_power_of_four_scales_a_solution_and_changes_no_digit(exponent: int) -> None:
    """An oracle for extreme weights: the same weight near 1."""
    factor = 2.0**exponent
    for grid in (GRIDS[0], GRIDS[2]):
        quantizer = grid.quantizer(COLUMNS)
        near = solve_loftq(WEIGHTS["usual"], quantizer, 4, 2, SCALING)
        far = solve_loftq(WEIGHTS["usual"] * factor, quantizer, 4, 2, SCALING)
        assert torch.equal(far.codes, near.codes)
        assert torch.equal(far.scales.values, near.scales.values * factor)
        product = near.b @ near.a * factor
        assert torch.allclose(far.b @ far.a, product, rtol=1e-5, atol=1e-6 * float(product.abs().max()))
        assert far.trace.final == pytest.approx(near.trace.final * factor, rel=1e-5)


def test_usual_weights_have_no_unit() -> None:
    for weight in (torch.zeros(2, 2), torch.ones(2, 2), draw(4, 4) * 1e-9, draw(4, 4) * 1e9, torch.empty(0, 4)):
        assert unit_of(weight) == 1
    for weight in (draw(4, 4) * 1e30, draw(4, 4) * 1e-30):
        assert math.log2(unit_of(weight)) % 2 == 0
        assert unit_of(weight) != 1


def test_a_solution_that_is_not_finite_is_refused_by_the_layers_name() -> None:
    quantizer = GRIDS[0].quantizer(COLUMNS)
    solved = solve_loftq(WEIGHTS["usual"], quantizer, 4, 1, 1.0)
    check_solution(solved, quantizer, "layers.0.q_proj")
    broken = {
        "the factor A": replace(solved, a=solved.a * math.nan),
        "the factor B": replace(solved, b=solved.b / 0),
        "a scale": replace(solved, scales=replace(solved.scales, values=solved.scales.values / 0)),
        "the error": replace(solved, trace=replace(solved.trace, plain=math.nan)),
    }
    for part, solution in broken.items():
        with pytest.raises(OptionError, match=rf"layers\.0\.q_proj cannot be quantized \({part} is NaN or Inf"):
            check_solution(solution, quantizer, "layers.0.q_proj")


def test_integers_that_reach_beyond_float32_are_refused() -> None:
    weight = draw(ROWS, COLUMNS).sign() * 3.4e38
    quantizer = GRIDS[2].quantizer(COLUMNS)
    with pytest.raises(OptionError, match=r"layer cannot be quantized \(a quantized weight is NaN or Inf"):
        check_solution(solve_loftq(weight, quantizer, 4, 1, 1.0), quantizer, "layer")
