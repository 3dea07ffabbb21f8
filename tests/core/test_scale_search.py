"""Scale search against every factor tried in float64.

Covers: loftq/core/kernels/nearest.py.
"""

from collections.abc import Callable

import pytest
import torch
from grids import pairwise

from loftq.core.codebooks import INTEGERS, TABLES, ZERO_POINTS
from loftq.core.grid import Grid, Quantizer
from loftq.core.kernels import dispatch
from loftq.core.scale_search import FACTORS, search
from loftq.core.scales import Scales, encode_scales

KINDS = [(name, None) for name in TABLES] + [(name, zero) for name in INTEGERS for zero in ZERO_POINTS]
SHAPES = [(7, 24, 8), (5, 96, 96), (48, 320, 64), (64, 80, 64), (20, 264, 264), (16, 150, 40)]  # rows, inputs, block
pytestmark = pytest.mark.usefixtures("set_threads")


def weight_of(rows: int, columns: int) -> torch.Tensor:
    """Rows of many sizes, off zero by as much, with one of zeros and one of equal values."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) + torch.randn(rows, 1, generator=generator)
    weight *= torch.logspace(-3, 1, rows).unsqueeze(1)
    weight[1], weight[2] = 0, -0.37
    return weight


def importance_of(columns: int) -> torch.Tensor:
    """From next to nothing to a hundred times the middle, and one column that does not count."""
    importance = torch.logspace(-2, 2, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    importance[0] = 0
    return importance


def errors_of(
    weight: torch.Tensor, quantizer: Quantizer, scales: Scales, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """The weighted squared error of each block, in float64."""
    rounded = quantizer.decode(quantizer.encode(weight, scales), scales, weight.shape)
    squares = (weight - rounded).double().square()
    if importance is not None:
        squares = squares * importance.double()
    return squares.view(-1, quantizer.block_size).sum(dim=1)


def extremes(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = weight.double().view(-1, block)
    return blocks.amin(dim=1), blocks.amax(dim=1)


def test_factors_go_from_two_fifths_to_a_little_above_one() -> None:
    assert sorted(FACTORS) == pytest.approx([0.4 + 0.025 * n for n in range(27)])
    assert FACTORS[0] == 1


@pytest.mark.parametrize(
    ("rows", "columns", "block", "name", "zero", "path", "weighted"),
    pairwise(SHAPES, KINDS, ["compiled", "torch"], [False, True]),
)
def test_each_block_has_the_best_of_all_factors(
    rows: int, columns: int, block: int, name: str, zero: str, path: str, weighted: bool, request: pytest.FixtureRequest
) -> None:
    """Oracle: all factors in float64, the stored form of the scales included. Sums may round their last bits."""
    weight, importance = weight_of(rows, columns), importance_of(columns) if weighted else None
    quantizer = Grid(name, block, zero_point=zero).quantizer(columns, torch.float16)
    extent = quantizer.extent(weight)
    candidates = [quantizer.covering(extent, factor) for factor in torch.tensor(FACTORS)]
    tried = torch.stack([errors_of(weight, quantizer, scales, importance) for scales in candidates])
    plain = errors_of(weight, quantizer, quantizer.scales(weight), importance)
    if path == "torch":
        request.getfixturevalue("torch_path")
    found = errors_of(weight, quantizer, search(weight, quantizer, importance), importance)
    slack = 1e-5 * (1e-6 * weight.double().square().view(-1, block).sum(dim=1) + found)
    assert bool(((found - tried.amin(dim=0)).abs() <= slack).all())
    assert bool((found <= plain + slack).all())
    if quantizer.levels.numel() <= 16 and columns > 100 and zero != "float32":
        assert float(found.log().nan_to_num(0, 0, 0).mean()) < float(plain.log().nan_to_num(0, 0, 0).mean())


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", INTEGERS)
def test_extents_shrink_towards_what_must_stay(name: str, factor: float) -> None:
    """Oracle: the formulas of the zero-points in float64: zero stays a level; where shifts float, the middle stays."""
    weight = weight_of(48, 320)
    low, high = extremes(weight, 64)
    top = 2 ** int(name[3:]) - 1

    def of(zero: str) -> Scales:
        quantizer = Grid(name, 64, zero_point=zero).quantizer(320)
        return quantizer.covering(quantizer.extent(weight), factor)

    reach = 127 if top == 255 else top / 2
    wanted = factor * torch.maximum(-low, high) / reach
    torch.testing.assert_close(of("symmetric").values.double(), wanted, rtol=1e-6, atol=0)

    whole = of("integer")
    below, above = factor * low.clamp(max=0), factor * high.clamp(min=0)
    torch.testing.assert_close(whole.values.double(), (above - below) / top, rtol=1e-6, atol=0)
    zeros = torch.where(above > below, torch.round(-below * top / (above - below)), 0)
    assert float((whole.zeros.double() != zeros).double().mean()) < 0.01  # ties

    floating = of("float32")
    scale = floating.values.double()
    torch.testing.assert_close(scale, factor * (high - low) / top, rtol=1e-5, atol=1e-7)
    ends = floating.shifts.double().unsqueeze(1) + scale.unsqueeze(1) * torch.tensor([-(top + 1) / 2, (top - 1) / 2])
    torch.testing.assert_close(ends.mean(dim=1), (low + high) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "zero"), [("nf4", None), ("nf2", None), ("int4", "symmetric"), ("int3", "float")])
def test_double_quantization_rounds_what_was_chosen(name: str, zero: str | None) -> None:
    """Oracle: the scales that a search without it chooses, stored in 8 bits."""
    weight, importance = weight_of(48, 320), importance_of(320)
    chosen = search(weight, Grid(name, zero_point=zero).quantizer(320), importance)
    stored = search(weight, Grid(name, double_quant=True, zero_point=zero).quantizer(320), importance)
    assert stored.nested is not None
    assert torch.equal(stored.values, encode_scales(chosen.values).decode())


def test_importance_decides() -> None:
    weight, importance = weight_of(48, 320), importance_of(320)
    quantizer = Grid("nf2").quantizer(320)
    blind, aware = search(weight, quantizer), search(weight, quantizer, importance)
    weighted = [float(errors_of(weight, quantizer, scales, importance).sum()) for scales in (blind, aware)]
    plain = [float(errors_of(weight, quantizer, scales).sum()) for scales in (blind, aware)]
    assert weighted[1] < 0.95 * weighted[0]
    assert plain[0] < plain[1]


@pytest.mark.parametrize("name", ["nf3", "int3"])
@pytest.mark.parametrize("block", [64, 80, 320])
def test_parts_and_threads_do_not_matter(
    name: str, block: int, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the whole weight at once, on one thread."""
    weight, importance = weight_of(500, 320), importance_of(320)
    quantizer = Grid(name, block).quantizer(320)
    set_threads(1)
    expected = search(weight, quantizer, importance).values
    for count in (2, 3):
        set_threads(count)
        assert torch.equal(search(weight, quantizer, importance).values, expected)
    monkeypatch.setattr(dispatch, "CHUNK", 3000)
    assert torch.equal(search(weight, quantizer, importance).values, expected)


def test_huge_weights_have_scales() -> None:
    """Squares that overflow leave the plain scale."""
    weight = torch.full((2, 64), 1e30)
    weight[:, 1] = 3e29
    scales = search(weight, Grid("nf4").quantizer(64))
    assert bool((scales.values == 1e30).all())
