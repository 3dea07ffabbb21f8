"""Oracles: norms in float64, the solvers of other types on the same weight, and the formula of the projection."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loftq.core.grid import Grid
from loftq.core.metric import damped
from loftq.core.solvers.calibrated import solve_calibrated
from loftq.core.solvers.loftq import solve_loftq
from loftq.core.solvers.methods import METHODS
from loftq.core.solvers.solution import Solution
from loftq.core.solvers.trellis_coded import solve_trellis
from loftq.core.trellis import TrellisQuantizer
from loftq.errors import OptionError


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (160, 128) and the second moment of inputs that lie mostly in few directions."""
    torch.manual_seed(0)
    inputs = torch.randn(1024, 128) @ (torch.randn(128, 128) * torch.logspace(0, -1, 128)).T
    return torch.randn(160, 128) / 12, inputs.T @ inputs / 1024


def final(solution: Solution, weight: torch.Tensor, quantizer: TrellisQuantizer, scaling: float) -> torch.Tensor:
    """The error that the stored values leave, float64."""
    backbone = quantizer.decode(solution.codes, solution.scales, weight.shape).double()
    return weight.double() - backbone - scaling * (solution.b.double() @ solution.a.double())


@pytest.mark.parametrize(("method", "iterations"), [("calibrated", 1), ("calibrated", 3), ("loftq", 3), ("qlora", 0)])
def test_the_trace_says_what_was_returned(
    method: str, iterations: int, layer: tuple[torch.Tensor, torch.Tensor]
) -> None:
    weight, moment = layer
    quantizer = TrellisQuantizer(2.25)
    solution = solve_trellis(weight, quantizer, METHODS[method], moment, 8, iterations, 2.0)
    error = final(solution, weight, quantizer, 2.0)
    assert solution.trace.final == pytest.approx(float(error.norm()), rel=1e-4)
    assert solution.trace.weight == pytest.approx(float(weight.double().norm()), rel=1e-6)
    assert len(solution.trace.iterations) == iterations
    assert solution.a.shape == (8, 128)
    assert solution.b.shape == (160, 8)
    if method == "calibrated":
        assert solution.trace.outputs is not None
        h = damped(moment)
        assert solution.trace.outputs.final**2 == pytest.approx(float(((error @ h) * error).sum()), rel=1e-3)
        assert solution.trace.final != solution.trace.outputs.final
    else:
        assert solution.trace.outputs is None


@pytest.mark.parametrize(("rank", "most"), [(4, 0.6), (32, 0.5)])
def test_it_is_better_than_normal_float_of_more_bits(
    rank: int, most: float, layer: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The squared error of outputs against NF2 in blocks of 64, which takes 2.25 bits with its scales."""
    weight, moment = layer
    scalar = solve_calibrated(
        weight, Grid("nf2").quantizer(128, torch.float16), METHODS["calibrated"], moment, rank, 3, 1.0
    )
    coded = solve_trellis(weight, TrellisQuantizer(2), METHODS["calibrated"], moment, rank, 1, 1.0)
    assert scalar.trace.outputs is not None
    assert coded.trace.outputs is not None
    assert coded.trace.outputs.final**2 < most * scalar.trace.outputs.final**2


def test_without_text_it_is_better_too(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, _ = layer
    scalar = solve_loftq(weight, Grid("nf2").quantizer(128), 8, 5, 1.0)
    coded = solve_trellis(weight, TrellisQuantizer(2), METHODS["loftq"], None, 8, 5, 1.0)
    assert coded.trace.final < 0.6 * scalar.trace.final
    assert coded.trace.final <= coded.trace.iterations[0] < coded.trace.plain


def test_the_backbone_lacks_what_the_adapter_adds(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Along the leading eigenvectors of H the backbone only has errors of others; without an adapter it has all.

    If it is not projected, it has all of them too.
    """
    weight, moment = layer
    directions = torch.linalg.eigh(damped(moment)).eigenvectors[:, -16:].float()
    quantizer = TrellisQuantizer(3)
    for rounding, iterations, low, high in (
        ("projected", 1, 0.0, 0.6),
        ("projected", 0, 0.9, 1.1),
        ("intrinsic", 1, 0.7, 1.3),
    ):
        method = replace(METHODS["calibrated"], rounding=rounding)
        solution = solve_trellis(weight, quantizer, method, moment, 16, iterations, 1.0)
        backbone = quantizer.decode(solution.codes, solution.scales, weight.shape)
        part = float((backbone @ directions).norm() / (weight @ directions).norm())
        assert low <= part < high
        assert bool(solution.b.any()) == (iterations > 0)


@pytest.mark.parametrize("factor", [2.0**30, 2.0**90, 2.0**-90])
def test_the_size_of_a_weight_does_not_matter(factor: float, layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    """For other types neither."""
    weight, moment = layer
    for solve, quantizer in (
        (solve_trellis, TrellisQuantizer(2)),
        (solve_calibrated, Grid("nf2").quantizer(128)),
    ):
        arguments = (quantizer, METHODS["calibrated"], moment, 8, 1, 1.0)
        usual, scaled = solve(weight, *arguments).trace, solve(weight * factor, *arguments).trace  # type: ignore[operator]
        assert scaled.final / scaled.weight == pytest.approx(usual.final / usual.weight, rel=1e-3)


def test_the_same_seed_gives_the_same_bytes(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, moment = layer
    first, second = (
        solve_trellis(weight, TrellisQuantizer(2), METHODS["calibrated"], moment, 8, 1, 1.0, seed=3) for _ in range(2)
    )
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.a, second.a)


def test_a_rank_that_is_too_large_is_refused(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, moment = layer
    with pytest.raises(OptionError, match="rank 200"):
        solve_trellis(weight, TrellisQuantizer(2), METHODS["calibrated"], moment, 200, 1, 1.0)
