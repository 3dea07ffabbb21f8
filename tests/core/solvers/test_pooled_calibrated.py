"""QA-LoRA's start under known inputs, against what the weights alone give, and its own parts in float64."""

from itertools import pairwise

import pytest
import torch

from loftq.core import pooled
from loftq.core.affine import AffineQuantizer
from loftq.core.metric import damped
from loftq.core.solvers.methods import METHODS
from loftq.core.solvers.pooled import solve_pooled
from loftq.core.solvers.pooled_calibrated import solve_pooled_calibrated
from loftq.core.solvers.solution import Solution

GENERATOR = torch.Generator().manual_seed(1)
WEIGHT = 0.02 * torch.randn(48, 64, generator=GENERATOR)
INPUTS = torch.randn(500, 64, generator=GENERATOR) * torch.logspace(0.5, -1, 64)
INPUTS = (INPUTS @ torch.linalg.qr(torch.randn(64, 64, generator=GENERATOR))[0]) + 0.3
MOMENT = INPUTS.T @ INPUTS / len(INPUTS)
POOL, RANK, SCALING = 16, 2, 0.5
METHOD = METHODS["calibrated"]
KINDS = [(codebook, zero) for codebook in ("int2", "int3", "int4") for zero in ("integer", "float", "symmetric")]


def quantizer_of(codebook: str, zero_point: str) -> AffineQuantizer:
    return AffineQuantizer(codebook, POOL, zero_point)


def left_over(solution: Solution, quantizer: AffineQuantizer) -> torch.Tensor:
    """W − Q − C, from what was returned alone."""
    backbone = quantizer.decode(solution.codes, solution.scales, WEIGHT.shape).double()
    correction = pooled.correction(solution.a.double(), solution.b.double(), SCALING, POOL)
    return WEIGHT.double() - backbone - pooled.spread(correction, POOL)


def output_norm(error: torch.Tensor) -> float:
    """√tr(E H Eᵀ) under the damped H."""
    return float((error.double() @ damped(MOMENT) * error.double()).sum().sqrt())


def run(quantizer: AffineQuantizer, iterations: int) -> Solution:
    return solve_pooled_calibrated(WEIGHT, quantizer, METHOD, MOMENT, RANK, iterations, SCALING, POOL)


@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize(("codebook", "zero_point"), KINDS)
def test_the_trace_says_what_was_returned(codebook: str, zero_point: str, iterations: int) -> None:
    """Oracle: `left_over`, measured in float64."""
    quantizer = quantizer_of(codebook, zero_point)
    solution = run(quantizer, iterations)
    error = left_over(solution, quantizer)
    assert solution.trace.outputs is not None
    assert solution.trace.final == pytest.approx(float(error.norm()), rel=1e-4)
    assert solution.trace.outputs.final == pytest.approx(output_norm(error), rel=1e-3)


@pytest.mark.parametrize(("codebook", "zero_point"), KINDS)
def test_outputs_err_less_than_by_the_weights_alone(codebook: str, zero_point: str) -> None:
    """Oracle: the least squares of the weights, which know no inputs."""
    quantizer = quantizer_of(codebook, zero_point)
    data_free = solve_pooled(WEIGHT, quantizer, RANK, 5, SCALING, POOL)
    assert output_norm(left_over(run(quantizer, 4), quantizer)) < 0.8 * output_norm(left_over(data_free, quantizer))


@pytest.mark.parametrize(("codebook", "zero_point"), KINDS)
def test_more_rounds_never_leave_more(codebook: str, zero_point: str) -> None:
    """Oracle: the same start with fewer rounds."""
    quantizer = quantizer_of(codebook, zero_point)
    found = [output_norm(left_over(run(quantizer, rounds), quantizer)) for rounds in (0, 1, 3, 6)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(found))
    assert found[1] < found[0]


def test_nothing_is_left_for_an_adapter_where_shifts_float() -> None:
    """Oracle: B = 0."""
    assert not run(AffineQuantizer("int4", POOL, "float32"), 3).b.any()


def test_the_adapter_is_the_best_of_its_rank() -> None:
    """Oracle: a dense least-squares solution: the SVD of the best correction, whitened, in float64."""
    quantizer = quantizer_of("int3", "integer")
    solution = run(quantizer, 1)
    backbone = quantizer.decode(solution.codes, solution.scales, WEIGHT.shape).double()
    root = torch.linalg.cholesky(damped(MOMENT))
    pools = torch.eye(64 // POOL, dtype=torch.float64).repeat_interleave(POOL, dim=0)  # (in, L)
    design = root.T @ pools
    residual = WEIGHT.double() - backbone
    best = torch.linalg.lstsq(design, root.T @ residual.T).solution.T  # (out, L)
    _, r = torch.linalg.qr(design)
    u, s, vh = torch.linalg.svd(best @ r.T, full_matrices=False)
    expected = torch.linalg.solve(r, (u[:, :RANK] * s[:RANK] @ vh[:RANK]).T).T
    found = pooled.correction(solution.a.double(), solution.b.double(), SCALING, POOL)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
