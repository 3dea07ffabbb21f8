"""Rounding that knows its inputs against GPTQ's own formulas in float64, and against every code there is.

Covers: loftq/core/kernels/rounding.py, loftq/core/kernels/gpu_rounding.py.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from grids import pairwise, thinned

from loftq.core import rounding
from loftq.core.codebooks import INTEGERS, TABLES, ZERO_POINTS
from loftq.core.grid import Grid, Quantizer
from loftq.core.kernels import dispatch
from loftq.core.packing import single
from loftq.core.scales import Scales
from loftq.errors import OptionError

KINDS = [(name, None) for name in TABLES] + [(name, zero) for name in INTEGERS for zero in ZERO_POINTS]
# rows, inputs, block: one panel and several, whole rows, blocks that end inside rows, rows that fill no tile
SHAPES = [(7, 24, 8), (5, 96, 96), (64, 80, 64), (70, 136, 136), (16, 150, 40)]
pytestmark = pytest.mark.usefixtures("set_threads")


def weight_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of many sizes, off zero by as much, with one of zeros and one of equal values."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) + 0.3 * torch.randn(rows, 1, generator=generator)
    weight *= torch.logspace(-3, 1, rows).unsqueeze(1)
    weight[1], weight[2] = 0, -0.37
    return weight


@cache
def moment_of(columns: int) -> torch.Tensor:
    """The damped second moment of correlated inputs: float64 (columns, columns)."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = mix * torch.logspace(0, -2, columns, dtype=torch.float64) @ mix.T
    moment = x @ x.T / columns
    return moment + 0.01 * moment.diagonal().mean() * torch.eye(columns, dtype=torch.float64)


@cache
def leading(columns: int, rank: int) -> torch.Tensor:
    """The first eigenvectors of `moment_of` (in, rank), not of unit length and not quite at right angles."""
    vectors = torch.linalg.eigh(moment_of(columns))[1][:, -rank:]
    vectors = vectors * torch.linspace(0.1, 3, rank, dtype=torch.float64)
    vectors[:, 0] += vectors[:, -1]
    return vectors


def grid_of(quantizer: Quantizer, scales: Scales, shape: tuple[int, int]) -> torch.Tensor:
    """All values that each weight can take, as float32 gives them back: float64 (out, in, levels)."""
    block = quantizer.block_size
    scale = scales.values.repeat_interleave(block).view(*shape, 1)
    shift = scales.offsets.repeat_interleave(block).view(*shape, 1)
    return (quantizer.levels * scale + shift).double()


def costs(error: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """e H eᵀ of each row, in float64."""
    return ((error.double() @ moment) * error.double()).sum(dim=-1)


def cost(weight: torch.Tensor, quantizer: Quantizer, scales: Scales, codes: torch.Tensor, H: torch.Tensor) -> float:
    return float(costs(weight - quantizer.decode(codes, scales, weight.shape), H).sum())


def assert_codes_are_gptqs(
    codes: torch.Tensor, weight: torch.Tensor, quantizer: Quantizer, scales: Scales, moment: torch.Tensor
) -> None:
    """Optimal brain surgery column by column in float64, with the inverse of H and its updates, along our codes.

    A code must be nearest to what our earlier codes made of its weight; near a tie float32 may go either way, after
    which two roundings would have little in common. A moment larger than the weight has columns that are not rounded.
    """
    rows, columns = weight.shape
    grid = grid_of(quantizer, scales, (rows, columns))
    bits = len(quantizer.levels).bit_length() - 1
    chosen = single(codes, bits).view(rows, columns, 1).long()
    rounded = grid.gather(2, chosen).squeeze(2)
    extended = torch.nn.functional.pad(weight.double(), (0, len(moment) - columns))
    size = extended.abs().amax(dim=1)
    inverse = torch.linalg.inv(moment)
    for j in range(columns):
        distances = (grid[:, j] - extended[:, j : j + 1]).abs()
        excess = distances.gather(1, chosen[:, j]).squeeze(1) - distances.amin(dim=1)
        assert bool((excess <= 1e-5 * size).all()), f"column {j}"
        error = (extended[:, j] - rounded[:, j]) / inverse[j, j]
        extended -= error.unsqueeze(1) * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]


@pytest.mark.parametrize(("rows", "columns", "block", "name", "zero"), pairwise(SHAPES, KINDS))
def test_feedback_is_gptqs(rows: int, columns: int, block: int, name: str, zero: str | None) -> None:
    """Oracle: GPTQ's formulas (arXiv 2210.17323, equations 2 and 3) in float64."""
    weight, moment = weight_of(rows, columns), moment_of(columns)
    quantizer = Grid(name, block, zero_point=zero).quantizer(columns, torch.float16)
    scales = quantizer.scales(weight)
    assert_codes_are_gptqs(rounding.feedback(weight, quantizer, scales, moment), weight, quantizer, scales, moment)


@pytest.mark.parametrize("name", ["nf2", "int4"])
def test_feedback_with_directions_is_gptqs_on_the_extended_moment(name: str) -> None:
    """Oracle: the same with [[H, HV], [VᵀH, VᵀHV + λI]] written out, its last columns never rounded."""
    weight, moment = weight_of(48, 320), moment_of(320)
    quantizer = Grid(name).quantizer(320)
    scales = quantizer.scales(weight)
    given = leading(320, 8)
    basis = torch.linalg.svd(given, full_matrices=False)[0]
    corner = basis.T @ moment @ basis + 0.01 * moment.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    side = moment @ basis
    extended = torch.cat([torch.cat([moment, side], 1), torch.cat([side.T, corner], 1)])
    codes = rounding.feedback(weight, quantizer, scales, moment, given)
    assert_codes_are_gptqs(codes, weight, quantizer, scales, extended)


@pytest.mark.parametrize("name", ["nf2", "nf3", "int2", "int4"])
def test_directions_leave_less_once_corrected(name: str) -> None:
    """Oracle: the best B for A = Vᵀ, by least squares in float64."""
    weight, moment = weight_of(48, 320), moment_of(320)
    quantizer = Grid(name).quantizer(320)
    scales, given = quantizer.scales(weight), leading(320, 8)

    def corrected(codes: torch.Tensor) -> float:
        error = (weight - quantizer.decode(codes, scales, weight.shape)).double()
        b = error @ moment @ given @ torch.linalg.inv(given.T @ moment @ given)
        return float(costs(error - b @ given.T, moment).sum())

    without = corrected(rounding.feedback(weight, quantizer, scales, moment))
    assert corrected(rounding.feedback(weight, quantizer, scales, moment, given)) < 0.9 * without


@pytest.mark.parametrize(
    ("rows", "columns", "block", "name", "zero", "path"), pairwise(SHAPES, KINDS, ["compiled", "torch"])
)
def test_inputs_of_no_correlation_round_to_the_nearest(
    rows: int, columns: int, block: int, name: str, zero: str | None, path: str, request: pytest.FixtureRequest
) -> None:
    """Oracle: the quantizer's own codes, bit for bit. A diagonal H leaves nothing to repay; descent stays."""
    weight = weight_of(rows, columns)
    quantizer = Grid(name, block, zero_point=zero).quantizer(columns)
    codes, scales = quantizer.quantize(weight)
    if path == "torch":
        request.getfixturevalue("torch_path")
    moment = torch.diag(torch.linspace(0.5, 3, columns))
    assert torch.equal(rounding.feedback(weight, quantizer, scales, moment), codes)
    assert torch.equal(rounding.descend(weight, quantizer, scales, codes, moment), codes)


@pytest.mark.parametrize(
    ("name", "zero"), [("nf2", None), ("int2", "symmetric"), ("int2", "integer"), ("int2", "float")]
)
def test_all_codes_of_short_rows(name: str, zero: str | None) -> None:
    """Oracle: all 65,536 roundings of 8 weights. None is better than the best, and from there nothing moves."""
    weight, moment = weight_of(24, 8), moment_of(8)
    quantizer = Grid(name, 8, zero_point=zero).quantizer(8)
    nearest, scales = quantizer.quantize(weight)
    grid = grid_of(quantizer, scales, (24, 8))
    every = torch.cartesian_prod(*[torch.arange(4)] * 8)  # (65536, 8)
    found, best = [], torch.empty(24, 8, dtype=torch.uint8)
    for row in range(24):
        values = grid[row].gather(1, every.T).T
        cost_of = costs(weight[row].double() - values, moment)
        found.append(float(cost_of.min()))
        best[row] = every[cost_of.argmin()].to(torch.uint8)
    least = torch.tensor(found, dtype=torch.float64)
    packed = best.view(-1)[::2] << 4 | best.view(-1)[1::2]
    again = rounding.descend(weight, quantizer, scales, packed, moment)
    live = scales.values > 0  # codes of zeros are all the same
    assert torch.equal(single(again, 2).view(24, 8)[live], best[live])

    def row_costs(codes: torch.Tensor) -> torch.Tensor:
        return costs(weight - quantizer.decode(codes, scales, weight.shape), moment)

    fed = rounding.feedback(weight, quantizer, scales, moment)
    descended = rounding.descend(weight, quantizer, scales, fed, moment, rounds=3)
    floor = least * (1 - 1e-5)
    assert bool((row_costs(fed) >= floor).all())
    assert bool((row_costs(descended) >= floor).all())
    rough = least > 1e-12 * weight.double().square().sum(dim=1)  # others are on the grid
    relative = torch.stack([row_costs(codes)[rough] / least[rough] for codes in (nearest, fed, descended)])
    plain, fed_mean, descended_mean = relative.log().mean(dim=1).tolist()
    assert -1e-5 <= descended_mean <= fed_mean < 0.8 * plain


@pytest.mark.parametrize(("name", "zero", "start"), pairwise(KINDS, ["nearest", "fed back", "random"]))
def test_descent_only_goes_down_and_ends_where_no_single_code_helps(name: str, zero: str | None, start: str) -> None:
    """Oracle: the error in float64 after each round; at the end, of every level for every weight."""
    weight, moment = weight_of(12, 40), moment_of(40)
    quantizer = Grid(name, 8, zero_point=zero).quantizer(40)
    codes, scales = quantizer.quantize(weight)
    if start == "fed back":
        codes = rounding.feedback(weight, quantizer, scales, moment)
    elif start == "random":
        codes = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    before = cost(weight, quantizer, scales, codes, moment)
    trace = [before]
    for _ in range(2000):
        after = rounding.descend(weight, quantizer, scales, codes, moment)
        trace.append(cost(weight, quantizer, scales, after, moment))
        assert trace[-1] <= trace[-2] * (1 + 1e-6)
        if torch.equal(after, codes):
            break
        codes = after
    else:
        pytest.fail("never ends")
    assert trace[-1] < before
    twice = rounding.descend(weight, quantizer, scales, codes, moment, rounds=2)
    assert torch.equal(twice, codes)

    error = (weight - quantizer.decode(codes, scales, weight.shape)).double()
    slope = (error @ moment).unsqueeze(2)
    step = weight.double().unsqueeze(2) - grid_of(quantizer, scales, (12, 40)) - error.unsqueeze(2)  # (out, in, levels)
    gain = -(2 * slope * step + moment.diagonal().view(1, -1, 1) * step.square())
    assert bool((gain.amax(dim=(1, 2)) <= 1e-6 * costs(error, moment) + 1e-12).all())


@pytest.mark.parametrize("name", ["nf2", "int3"])
def test_rounds_of_descent_are_one_after_another(name: str) -> None:
    weight, moment = weight_of(48, 320), moment_of(320)
    quantizer = Grid(name).quantizer(320)
    codes, scales = quantizer.quantize(weight)
    once = rounding.descend(weight, quantizer, scales, codes, moment)
    assert not torch.equal(once, codes)
    twice = rounding.descend(weight, quantizer, scales, once, moment)
    assert torch.equal(rounding.descend(weight, quantizer, scales, codes, moment, rounds=2), twice)


@pytest.mark.parametrize("name", ["nf2", "int4"])
def test_descent_from_known_pulls(name: str) -> None:
    """Oracle: the descent that computes them, up to ties; E H in float64."""
    weight, moment = weight_of(48, 320), moment_of(320)
    quantizer = Grid(name).quantizer(320)
    codes, scales = quantizer.quantize(weight)
    pulls = ((weight - quantizer.decode(codes, scales, weight.shape)).double() @ moment).float()
    expected = rounding.descend(weight, quantizer, scales, codes, moment, 2)
    found = rounding.descend(weight, quantizer, scales, codes, moment, 2, pulls)
    assert not torch.equal(expected, codes)
    assert float((found != expected).float().mean()) < 1e-3
    assert cost(weight, quantizer, scales, found, moment) == pytest.approx(
        cost(weight, quantizer, scales, expected, moment), rel=1e-4
    )


@pytest.mark.parametrize("block", [64, 40])  # blocks that end where rows do, and only where eight rows do
def test_rows_descend_alike_in_tiles(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: all rows together."""
    weight, moment = weight_of(72, 320 if block == 64 else 145), moment_of(320 if block == 64 else 145)
    quantizer = Grid("nf3", block).quantizer(weight.shape[1])
    codes, scales = quantizer.quantize(weight)
    together = rounding.descend(weight, quantizer, scales, codes, moment, 2)
    monkeypatch.setattr(rounding, "_CACHED", 1000)
    assert torch.equal(rounding.descend(weight, quantizer, scales, codes, moment, 2), together)


CASES = pairwise(SHAPES, KINDS)


def everything(weight: torch.Tensor, quantizer: Quantizer, moment: torch.Tensor) -> list[torch.Tensor]:
    scales = quantizer.scales(weight)
    fed = rounding.feedback(weight, quantizer, scales, moment)
    towards = rounding.feedback(weight, quantizer, scales, moment, leading(weight.shape[1], 4))
    return [fed, towards, rounding.descend(0.9 * weight, quantizer, scales, fed, moment, rounds=2)]


@pytest.mark.parametrize(
    ("rows", "columns", "block", "name", "zero"), thinned(CASES, lambda *case: CASES.index(case) % 2 == 0)
)
def test_torch_path_equals_compiled_path(
    rows: int, columns: int, block: int, name: str, zero: str | None, request: pytest.FixtureRequest
) -> None:
    """Oracle: the compiled loop, bit for bit."""
    weight, moment = weight_of(rows, columns), moment_of(columns)
    quantizer = Grid(name, block, zero_point=zero).quantizer(columns)
    compiled = everything(weight, quantizer, moment)
    request.getfixturevalue("torch_path")
    for found, expected in zip(everything(weight, quantizer, moment), compiled, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "zero"), [("nf2", None), ("nf3", None), ("int2", "integer"), ("int4", "float")])
@pytest.mark.parametrize("rows", [5, pytest.param(17, marks=pytest.mark.slow)])
def test_the_kernel_equals_the_compiled_path(
    rows: int, name: str, zero: str | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the compiled loop, bit for bit; three panels, the last a narrow one, and rows that fill no program."""
    monkeypatch.setattr(rounding, "_PANEL", 10)
    weight, moment = weight_of(rows, 24), moment_of(24)
    quantizer = Grid(name, 8 if zero else 24, zero_point=zero).quantizer(24)
    codes, scales = quantizer.quantize(weight)

    def all_ways() -> list[torch.Tensor]:
        fed = rounding.feedback(weight, quantizer, scales, moment)
        return [fed, rounding.descend(weight, quantizer, scales, codes, moment)]

    compiled = all_ways()
    request.getfixturevalue("triton_path")
    for found, expected in zip(all_ways(), compiled, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["nf4", "int4"])
def test_results_do_not_depend_on_the_number_of_threads(name: str, set_threads: Callable[[int], None]) -> None:
    """Oracle: one thread. As many rows as make three threads share a panel, unevenly."""
    weight, moment = weight_of(1100, 320), moment_of(320)
    quantizer = Grid(name).quantizer(320)
    set_threads(1)
    alone = everything(weight, quantizer, moment)
    for count in (2, 3):
        set_threads(count)
        for found, expected in zip(everything(weight, quantizer, moment), alone, strict=True):
            assert torch.equal(found, expected), f"{count} threads"


def test_squared_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the trace, in float64; several parts of the rows."""
    error, moment = weight_of(30, 40), moment_of(40)
    expected = float(torch.trace(error.double() @ moment @ error.double().T))
    assert rounding.output_squared_norm(error, moment) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(dispatch, "CHUNK", 400)
    assert rounding.output_squared_norm(error, moment) == pytest.approx(expected, rel=1e-12)
    assert rounding.output_squared_norm(error, moment.float()) == pytest.approx(expected, rel=1e-5)


def test_a_moment_that_is_not_positive_definite_is_refused() -> None:
    quantizer = Grid("nf4").quantizer(64)
    weight = torch.ones(2, 64)
    with pytest.raises(OptionError, match=r"second moment \(64, 64\) is not positive definite"):
        rounding.feedback(weight, quantizer, quantizer.scales(weight), torch.ones(64, 64) - torch.eye(64))
