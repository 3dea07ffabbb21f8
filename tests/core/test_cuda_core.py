"""The solver on a GPU, beside the CPU: the same codes but for ties, and errors that hold in float64."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from loftq.core.affine import AffineQuantizer
from loftq.core.grid import Grid, Quantizer
from loftq.core.metric import damped
from loftq.core.moments import Moment, assemble
from loftq.core.packing import single
from loftq.core.rounding import descend, feedback
from loftq.core.scale_search import search
from loftq.core.scales import NestedScales, Scales
from loftq.core.solvers.calibrated import solve_calibrated
from loftq.core.solvers.loftq import solve_loftq
from loftq.core.solvers.methods import METHODS
from loftq.core.solvers.pooled import solve_pooled
from loftq.core.solvers.pooled_calibrated import solve_pooled_calibrated
from loftq.core.solvers.solution import Solution
from loftq.core.solvers.trellis_coded import solve_trellis
from loftq.core.trellis import TrellisCode, TrellisQuantizer, TrellisScales

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = 0.02 * torch.randn(384, 320, generator=GENERATOR)
INPUTS = torch.randn(1000, 320, generator=GENERATOR) * torch.logspace(0.5, -1, 320)
MOMENT = INPUTS.T @ INPUTS / len(INPUTS)
KINDS = [
    Grid("nf4"),
    Grid("nf4", double_quant=True),
    Grid("nf3", 32),
    Grid("nf2"),
    Grid("int4", 32, zero_point="float"),
    Grid("int3", 64, zero_point="integer"),
    Grid("int2", 64, zero_point="symmetric"),
    Grid("int8", -1, zero_point="symmetric"),
]
TIES = 2e-3  # of the codes


def moved(scales: Scales, device: torch.device | str) -> Scales:
    """The same scales on another device."""
    old = scales.nested
    nested = old and NestedScales(old.codes.to(device), old.absmax.to(device), old.offset)
    shifts, zeros = (None if part is None else part.to(device) for part in (scales.shifts, scales.zeros))
    return Scales(scales.values.to(device), nested, shifts, zeros)


def left_over(solution: Solution, quantizer: Quantizer) -> torch.Tensor:
    """W − Q − B·A in float64, as the CPU reads what a GPU returned."""
    backbone = quantizer.decode(solution.codes.cpu(), moved(solution.scales, "cpu"), WEIGHT.shape).double()
    return WEIGHT.double() - backbone - solution.b.cpu().double() @ solution.a.cpu().double()


def output_norm(error: torch.Tensor) -> float:
    return float((error @ damped(MOMENT) * error).sum().sqrt())


def differing(found: torch.Tensor, expected: torch.Tensor, bits: int) -> float:
    return float((single(found.cpu(), bits) != single(expected, bits)).float().mean())


@pytest.mark.parametrize("grid", KINDS, ids=str)
def test_rounding_is_the_cpus(grid: Grid, cuda: torch.device) -> None:
    """Oracle: the compiled loops. Scales are theirs but for a last bit, codes under the same scales but for ties."""
    quantizer = grid.quantizer(320)
    scales, theirs = quantizer.scales(WEIGHT.to(cuda)), quantizer.scales(WEIGHT)
    torch.testing.assert_close(scales.values.cpu(), theirs.values, rtol=1e-3, atol=0)
    torch.testing.assert_close(scales.offsets.cpu(), theirs.offsets, rtol=1e-3, atol=1e-6)
    there = moved(theirs, cuda)
    codes = quantizer.encode(WEIGHT.to(cuda), there)
    assert differing(codes, quantizer.encode(WEIGHT, theirs), grid.bits) < TIES
    decoded = quantizer.decode(codes, there, WEIGHT.shape).cpu()
    assert torch.equal(decoded, quantizer.decode(codes.cpu(), theirs, WEIGHT.shape))


@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize("grid", KINDS, ids=str)
def test_loftq_is_the_cpus(grid: Grid, iterations: int, cuda: torch.device) -> None:
    """Oracle: the trace against float64, and the CPU's trace."""
    quantizer = grid.quantizer(320)
    solution = solve_loftq(WEIGHT.to(cuda), quantizer, 16, iterations, 1.0)
    assert solution.codes.device == solution.a.device == solution.b.device
    assert solution.trace.final == pytest.approx(float(left_over(solution, quantizer).norm()), rel=1e-4)
    apart = 5e-2 if grid.codebook == "int2" else 5e-3  # its largest values are ties
    theirs = solve_loftq(WEIGHT, quantizer, 16, iterations, 1.0).trace.final
    assert solution.trace.final == pytest.approx(theirs, rel=apart)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs_moment])
@pytest.mark.parametrize("grid", KINDS, ids=str)
def test_calibrated_starts_are_the_cpus(grid: Grid, name: str, cuda: torch.device) -> None:
    """Oracle: the trace of outputs against float64, and the CPU's."""
    quantizer, method = grid.quantizer(320), METHODS[name]
    solution = solve_calibrated(WEIGHT.to(cuda), quantizer, method, MOMENT, 16, method.iterations, 1.0)
    theirs = solve_calibrated(WEIGHT, quantizer, method, MOMENT, 16, method.iterations, 1.0)
    assert solution.trace.outputs is not None
    assert theirs.trace.outputs is not None
    assert solution.trace.outputs.final == pytest.approx(output_norm(left_over(solution, quantizer)), rel=1e-3)
    assert solution.trace.outputs.final == pytest.approx(theirs.trace.outputs.final, rel=2e-2)


@pytest.mark.parametrize("shape", [(384, 320), (70, 136), (1, 64)])
@pytest.mark.parametrize("grid", KINDS, ids=str)
def test_feedback_and_descent_are_the_cpus(grid: Grid, shape: tuple[int, int], cuda: torch.device) -> None:
    """Oracle: the compiled loop, under its scales. Near a tie a row goes another way, and on from there."""
    columns = shape[1]
    grid = Grid(grid.codebook, 8 if columns == 136 else grid.block_size, grid.double_quant, grid.zero_point)
    quantizer = grid.quantizer(columns)
    weight, moment = WEIGHT[: shape[0], :columns].contiguous(), damped(MOMENT[:columns, :columns])
    nearest, scales = quantizer.quantize(weight)
    there = (quantizer, moved(scales, cuda))
    ours = [
        feedback(weight.to(cuda), *there, moment.to(cuda)),
        descend(weight.to(cuda), *there, nearest.to(cuda), moment.to(cuda), 2),
    ]
    theirs = [
        feedback(weight, quantizer, scales, moment),
        descend(weight, quantizer, scales, nearest, moment, 2),
    ]
    for found, expected in zip(ours, theirs, strict=True):
        same = (single(found.cpu(), grid.bits) == single(expected, grid.bits)).view(shape).all(dim=1)
        assert same.float().mean() > 0.8
        left = [
            weight.double() - quantizer.decode(each.cpu(), scales, weight.shape).double() for each in (found, expected)
        ]
        costs = [float((error @ moment * error).sum()) for error in left]
        assert costs[0] == pytest.approx(costs[1], rel=1e-2)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("grid", KINDS, ids=str)
def test_the_search_for_scales_is_the_cpus(grid: Grid, known: bool, cuda: torch.device) -> None:
    """Oracle: the compiled loop, but where two factors leave the same."""
    quantizer = grid.quantizer(320)
    importance = MOMENT.diagonal() if known else None
    found = search(WEIGHT.to(cuda), quantizer, None if importance is None else importance.to(cuda))
    expected = search(WEIGHT, quantizer, importance)
    near = (found.values.cpu() - expected.values).abs() <= 1e-4 * expected.values.abs()
    assert near.float().mean() > 0.99


@pytest.mark.parametrize("zero", ["integer", "float"])
@pytest.mark.parametrize("calibrated_start", [False, True])
def test_qalora_is_the_cpus(zero: str, calibrated_start: bool, cuda: torch.device) -> None:
    """Oracle: the CPU's trace."""
    quantizer = AffineQuantizer("int3", 32, zero)
    asked = (4, 3, 0.5, 32)
    traces = []
    for weight in (WEIGHT.to(cuda), WEIGHT):
        if calibrated_start:
            found = solve_pooled_calibrated(weight, quantizer, METHODS["calibrated"], MOMENT, *asked)
            assert found.trace.outputs is not None
            traces.append(found.trace.outputs.final)
        else:
            traces.append(solve_pooled(weight, quantizer, *asked).trace.final)
    assert traces[0] == pytest.approx(traces[1], rel=1e-2)


@pytest.mark.parametrize(("bits", "length"), [(2, 12), (2.5, 12), (2, 10)])
def test_trellis_codes_are_nearly_the_cpus(bits: float, length: int, cuda: torch.device) -> None:
    """Oracle: the CPU's trace; long columns have another path. Products are those of the decoded weight."""
    quantizer, method = TrellisQuantizer(bits, length), METHODS["calibrated"]
    found, theirs = (
        solve_trellis(weight, quantizer, method, MOMENT, 16, 1, 1.0) for weight in (WEIGHT.to(cuda), WEIGHT)
    )
    assert found.trace.outputs is not None
    assert theirs.trace.outputs is not None
    assert found.trace.outputs.final == pytest.approx(theirs.trace.outputs.final, rel=2e-2)
    scales = cast(TrellisScales, found.scales)
    stored = found.codes, scales.widths, scales.values, scales.columns
    code = TrellisCode(*stored, length)
    dense = code.decode()
    assert torch.equal(dense.cpu(), TrellisCode(*(part.cpu() for part in stored), length).decode())
    for vectors in (1, 3):
        x, y = torch.randn(vectors, 320, device=cuda), torch.randn(vectors, 384, device=cuda)
        torch.testing.assert_close(code.multiply(x), x @ dense.T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(code.multiply(y, back=True), y @ dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_exact(dtype: torch.dtype, cuda: torch.device) -> None:
    """Oracle: the product in float64."""
    inputs = torch.randn(3, 50, 700).to(dtype)
    moment = Moment(700, cuda)
    for batch in inputs:
        moment.add(batch.to(cuda))
    x = inputs.double().view(-1, 700)
    torch.testing.assert_close(assemble(moment.mean()).double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
