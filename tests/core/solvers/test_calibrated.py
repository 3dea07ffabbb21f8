"""The calibrated alternation against its own parts, done plainly in float64."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from loftq.core.grid import Grid, Quantizer
from loftq.core.metric import damped
from loftq.core.solvers.calibrated import solve_calibrated
from loftq.core.solvers.loftq import solve_loftq
from loftq.core.solvers.methods import METHODS, Method
from loftq.core.solvers.solution import Solution
from loftq.errors import OptionError

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = 0.02 * torch.randn(96, 64, generator=GENERATOR)
INPUTS = torch.randn(500, 64, generator=GENERATOR) * torch.logspace(0.5, -1, 64)
INPUTS = INPUTS @ torch.linalg.qr(torch.randn(64, 64, generator=GENERATOR))[0]
MOMENT = INPUTS.T @ INPUTS / len(INPUTS)
GRIDS = [Grid("nf4", 32), Grid("nf2", 64), Grid("int3", 32, zero_point="integer"), Grid("int4", 16, zero_point="float")]
NEED = [name for name, method in METHODS.items() if method.needs_moment]


def output_norm(error: torch.Tensor) -> float:
    """√tr(E H Eᵀ) under the damped H."""
    return float((error.double() @ damped(MOMENT) * error.double()).sum().sqrt())


def left_over(solution: Solution, quantizer: Quantizer, scaling: float = 1.0) -> torch.Tensor:
    """W − Q − s·B·A, from what was returned alone."""
    backbone = quantizer.decode(solution.codes, solution.scales, WEIGHT.shape).double()
    return WEIGHT.double() - backbone - scaling * solution.b.double() @ solution.a.double()


def run(method: Method, quantizer: Quantizer, iterations: int, scaling: float = 1.0, rank: int = 8) -> Solution:
    return solve_calibrated(WEIGHT, quantizer, method, MOMENT, rank, iterations, scaling)


@pytest.mark.parametrize("scaling", [1.0, 0.25])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_trace_says_what_was_returned(name: str, grid: Grid, scaling: float) -> None:
    """Oracle: `left_over`, measured in float64."""
    quantizer = grid.quantizer(64)
    solution = run(METHODS[name], quantizer, METHODS[name].iterations, scaling)
    trace, error = solution.trace, left_over(solution, quantizer, scaling)
    assert trace.outputs is not None
    assert trace.final == pytest.approx(float(error.norm()), rel=1e-4)
    assert trace.outputs.final == pytest.approx(output_norm(error), rel=1e-3)
    assert trace.outputs.weight == pytest.approx(output_norm(WEIGHT), rel=1e-5)
    plain = WEIGHT - quantizer.decode(*quantizer.quantize(WEIGHT), WEIGHT.shape)
    assert trace.outputs.plain == pytest.approx(output_norm(plain), rel=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_factors_of_plain_rounding_are_the_closed_form(grid: Grid) -> None:
    """Oracle: the truncated SVD of E L, L from Cholesky, in float64; it leaves the sum of the other squares."""
    quantizer = grid.quantizer(64)
    solution = run(METHODS["qera"], quantizer, 1)
    residual = (WEIGHT - quantizer.decode(*quantizer.quantize(WEIGHT), WEIGHT.shape)).double()
    values = torch.linalg.svdvals(residual @ torch.linalg.cholesky(damped(MOMENT)))
    expected = float(values[8:].square().sum().sqrt())
    assert output_norm(left_over(solution, quantizer)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rounding", ["feedback", "intrinsic", "projected"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_alternating_never_leaves_more(grid: Grid, rounding: str) -> None:
    """Oracle: the turn before; either half is a minimization."""
    method = replace(METHODS["calibrated"], rounding=rounding)
    outputs = run(method, grid.quantizer(64), 6).trace.outputs
    assert outputs is not None
    steps = outputs.iterations
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(steps))
    assert steps[-1] < steps[0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_projected_rounding_leaves_less_and_a_backbone_that_lacks_its_part(grid: Grid) -> None:
    """Oracle: intrinsic rounding, and the part of both backbones along the eigenvectors of H."""
    quantizer = grid.quantizer(64)
    directions = torch.linalg.eigh(damped(MOMENT)).eigenvectors[:, -8:].float()
    found, parts = [], []
    for rounding in ("projected", "intrinsic"):
        solution = run(replace(METHODS["calibrated"], rounding=rounding), quantizer, 3)
        assert solution.trace.outputs is not None
        found.append(solution.trace.outputs.final)
        backbone = quantizer.decode(solution.codes, solution.scales, WEIGHT.shape)
        parts.append(float((backbone @ directions).norm() / (WEIGHT @ directions).norm()))
    assert found[0] < found[1]
    assert parts[0] < 0.8 < parts[1]
    bare = run(replace(METHODS["calibrated"], rounding="projected"), quantizer, 0)
    backbone = quantizer.decode(bare.codes, bare.scales, WEIGHT.shape)
    assert float((backbone @ directions).norm() / (WEIGHT @ directions).norm()) > 0.8


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_methods_rank_by_the_error_of_outputs(grid: Grid) -> None:
    """Oracle: each method's objective holds the one before: plain, factors, rounding too, by turns."""
    names = ["qlora", "qera", "cloq", "calibrated"]
    found = []
    for name in names:
        outputs = run(METHODS[name], grid.quantizer(64), METHODS[name].iterations).trace.outputs
        assert outputs is not None
        found.append(outputs.final)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_without_inputs_the_search_alone_helps_loftq(grid: Grid) -> None:
    """Oracle: LoftQ under each block's own range."""
    method = replace(METHODS["loftq"], scales="search")
    quantizer = grid.quantizer(64)
    searched = solve_calibrated(WEIGHT, quantizer, method, None, 8, 5, 1.0)
    assert searched.trace.outputs is None
    assert searched.trace.final < solve_loftq(WEIGHT, quantizer, 8, 5, 1.0).trace.final
    assert searched.trace.final == pytest.approx(float(left_over(searched, quantizer).norm()), rel=1e-4)


def test_loftq_is_loftq_where_inputs_are_known() -> None:
    """Oracle: the solver that knows none; the outputs are measured beside."""
    quantizer = Grid("nf4", 64).quantizer(64)
    expected = solve_loftq(WEIGHT, quantizer, 8, 5, 1.0, svd="exact").trace
    assert run(METHODS["loftq"], quantizer, 5).trace.iterations == pytest.approx(expected.iterations, rel=1e-3)


@pytest.mark.parametrize("kept", [0, 1, 20])
@pytest.mark.parametrize("name", NEED)
def test_inputs_that_span_little_are_enough(name: str, kept: int) -> None:
    """Oracle: finite factors, and no more error than plain rounding leaves, where H is of low rank or zero."""
    inputs = INPUTS[:kept]
    moment = inputs.T @ inputs / max(kept, 1)
    quantizer = Grid("nf3", 32).quantizer(64)
    solution = solve_calibrated(WEIGHT, quantizer, METHODS[name], moment, 8, 2, 1.0)
    assert torch.isfinite(solution.a).all()
    assert torch.isfinite(solution.b).all()
    outputs = solution.trace.outputs
    assert outputs is not None
    assert outputs.final < outputs.plain


def test_no_iterations_leave_an_adapter_that_adds_nothing() -> None:
    """Oracle: B = 0, under the method's own rounding."""
    quantizer = Grid("nf4", 32).quantizer(64)
    solution = run(METHODS["cloq"], quantizer, 0)
    assert not solution.b.any()
    assert solution.trace.outputs is not None
    assert solution.trace.outputs.final < solution.trace.outputs.plain


@pytest.mark.parametrize("name", NEED)
def test_methods_that_need_inputs_say_so(name: str) -> None:
    """Oracle: the message."""
    with pytest.raises(OptionError, match="calibrate"):
        solve_calibrated(WEIGHT, Grid("nf4", 32).quantizer(64), METHODS[name], None, 8, 1, 1.0)
