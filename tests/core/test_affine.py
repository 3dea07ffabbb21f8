"""Integers in groups against brute force in float64, GPTQ's formulas, and bitsandbytes' INT8.

Covers: loftq/core/kernels/affine.py.
"""

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from grids import pairwise

from loftq.core.affine import AffineQuantizer
from loftq.core.codebooks import INTEGERS, ZERO_POINTS
from loftq.core.grid import ROW, Grid
from loftq.core.packing import single
from loftq.core.scales import Scales
from loftq.errors import OptionError, UnknownNameError

SHAPES = [(7, 24, 8), (1, 32, 32), (5, 96, 96), (48, 320, 64), (3, 40, 8), (1100, 128, 128)]  # rows, inputs, group
KINDS = [(name, zero) for name in INTEGERS for zero in ZERO_POINTS]
pytestmark = pytest.mark.usefixtures("set_threads")


def weight_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of many sizes, off zero by as much, with one of zeros and one of equal values."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) + torch.randn(shape[0], 1, generator=generator)
    weight *= torch.logspace(-3, 1, shape[0]).unsqueeze(1)
    if shape[0] > 2:
        weight[1], weight[2] = 0, -0.37
    return weight


def parts(scales: Scales) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and shifts in float64, a column each."""
    shifts = torch.zeros_like(scales.values) if scales.shifts is None else scales.shifts
    return scales.values.double().unsqueeze(1), shifts.double().unsqueeze(1)


@pytest.mark.parametrize(
    ("rows", "columns", "group", "name", "zero", "scale_dtype"),
    pairwise(SHAPES, KINDS, [torch.float32, torch.float16]),
)
def test_codes_are_the_nearest_by_brute_force(
    rows: int, columns: int, group: int, name: str, zero: str, scale_dtype: torch.dtype
) -> None:
    """Oracle: all levels of the group in float64. A tie to the last bit of a float may go either way."""
    weight = weight_of(rows, columns)
    quantizer = AffineQuantizer(name, group, zero, scale_dtype=scale_dtype)
    codes, scales = quantizer.quantize(weight)
    scale, shift = parts(scales)
    levels = torch.arange(2**quantizer.bits).double() - 2 ** (quantizer.bits - 1)
    values = weight.double().view(-1, group, 1)  # (groups, group, 1)
    distances = (levels * scale.unsqueeze(2) + shift.unsqueeze(2) - values).abs()
    chosen = single(codes, quantizer.bits).long().view(-1, group, 1)
    excess = distances.gather(2, chosen) - distances.amin(2, keepdim=True)
    assert bool((excess <= 1e-6 * (scale.unsqueeze(2) + values.abs())).all())


@pytest.mark.parametrize(
    ("name", "zero", "double", "corrected", "in_place"), pairwise(KINDS, [False, True], [False, True], [False, True])
)
def test_residual_is_the_weight_less_its_rounding(
    name: str, zero: str, double: bool, corrected: bool, in_place: bool
) -> None:
    """Oracle: `W − decode(encode(W − C))` in separate steps, and its squared norm in float64."""
    weight, correction = weight_of(48, 320), 0.1 * weight_of(48, 320, seed=1)
    quantizer = AffineQuantizer(name, 64, zero, double)
    codes, scales = quantizer.quantize(weight - correction if corrected else weight)
    expected = weight - quantizer.decode(codes, scales, weight.shape)
    out = correction if in_place else torch.full_like(weight, torch.nan)
    squared = quantizer.residual(weight, correction if corrected else None, out)
    assert torch.equal(out, expected)
    assert squared == pytest.approx(float(expected.double().square().sum()), rel=1e-5)


def everything(quantizer: AffineQuantizer, weight: torch.Tensor) -> dict[str, Any]:
    correction, residual = 0.1 * weight.flip(0), torch.empty_like(weight)
    codes, scales = quantizer.quantize(weight)
    squared = quantizer.residual(weight, correction, residual)
    return {
        "codes": codes,
        "scales": scales.values,
        "shifts": parts(scales)[1],
        "zeros": torch.empty(0) if scales.zeros is None else scales.zeros,
        "decoded": quantizer.decode(codes, scales, weight.shape),
        "residual": residual,
        "squared": torch.tensor(squared),
    }


@pytest.mark.parametrize(("rows", "columns", "group", "name", "zero", "double"), pairwise(SHAPES, KINDS, [False, True]))
def test_torch_path_equals_compiled_path(
    rows: int, columns: int, group: int, name: str, zero: str, double: bool, request: pytest.FixtureRequest
) -> None:
    """Oracle: the compiled loops, to the last bit but for sums, whose order is free."""
    quantizer = AffineQuantizer(name, group, zero, double, torch.float16)
    weight = weight_of(rows, columns)
    compiled = everything(quantizer, weight)
    request.getfixturevalue("torch_path")
    for what, value in everything(quantizer, weight).items():
        if what == "squared":
            torch.testing.assert_close(value, compiled[what], rtol=1e-6, atol=0)
        else:
            assert torch.equal(value, compiled[what]), what


@pytest.mark.parametrize(("name", "zero"), KINDS)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_representable_weights_survive_bit_for_bit(rows: int, columns: int, group: int, name: str, zero: str) -> None:
    """Oracle: the codes, scales and zero-points that the weight was made of: powers of two, so that nothing rounds."""
    generator = torch.Generator().manual_seed(0)
    quantizer = AffineQuantizer(name, group, zero, scale_dtype=torch.float16)
    bits, groups = quantizer.bits, rows * columns // group
    codes = torch.randint(2**bits, (groups, group), generator=generator)
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    half = 2 ** (bits - 1)
    step = 2.0 ** torch.randint(-6, 0, (groups,), generator=generator)
    zeros = torch.randint(2**bits, (groups,), generator=generator)
    if zero == "symmetric":
        shifts = None
        zeros = torch.full((groups,), half)
    else:
        shifts = step * (half - zeros)
    weight = ((codes - zeros.unsqueeze(1)) * step.unsqueeze(1)).view(rows, columns)
    made = Scales(step, None, shifts)
    given = quantizer.encode(weight, made)
    assert torch.equal(single(given, bits), codes.view(-1).to(torch.uint8))
    assert torch.equal(quantizer.decode(given, made, weight.shape), weight)
    if zero == "symmetric":
        return  # the largest value lies half a step above the last level: scales are not found again
    again, scales = quantizer.quantize(weight)
    assert torch.equal(scales.values, step)
    assert torch.equal(scales.shifts, shifts)
    assert torch.equal(again, given)
    if zero == "integer":
        assert torch.equal(scales.zeros, zeros.to(torch.uint8))


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_zero_points_are_gptqs(name: str) -> None:
    """Oracle: GPTQ's formulas (arXiv 2210.17323, its code's `find_params`) in float64."""
    weight = weight_of(48, 320)
    quantizer = AffineQuantizer(name, 64, "integer")
    codes, scales = quantizer.quantize(weight)
    groups, top = weight.double().view(-1, 64), 2**quantizer.bits - 1
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    step = (high - low) / top
    torch.testing.assert_close(scales.values.double(), step, rtol=1e-6, atol=0)
    zeros = torch.where(step > 0, torch.round(-low / step), 0)
    assert torch.equal(scales.zeros.double(), zeros)
    wanted = torch.clamp(torch.round(groups / step.unsqueeze(1)) + zeros.unsqueeze(1), 0, top)
    found = single(codes, quantizer.bits).view(-1, 64)
    live = step > 0
    assert float((found[live] != wanted[live]).float().mean()) < 1e-3  # ties


def test_int8_rows_are_bitsandbytes() -> None:
    """Oracle: bitsandbytes' own INT8 of the rows. It divides in another order: a tie to the last bit may differ."""
    weight = weight_of(48, 320)
    weight[1] = 1  # its scale of a row of zeros is one over zero
    wanted, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    weight = weight.half().float()
    codes, scales = Grid("int8", ROW).quantizer(320).quantize(weight)
    torch.testing.assert_close(scales.values * 127, absmax, rtol=1e-6, atol=0)
    found = codes.int().view(48, 320) - 128
    assert int(found.min()) == -127
    assert float((found != wanted).float().mean()) < 2e-2  # theirs rounds in float16 here
    assert int((found - wanted).abs().max()) <= 1


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize(("name", "zero"), KINDS)
@pytest.mark.parametrize("double", [False, True])
def test_groups_of_zeros_and_of_equal_values(
    name: str, zero: str, double: bool, path: str, request: pytest.FixtureRequest
) -> None:
    """A floating zero-point holds a constant group, to 16 bits; no kind makes anything of zeros."""
    if path == "torch":
        request.getfixturevalue("torch_path")
    weight = torch.zeros(8, 64)
    weight[3] = 0.3
    quantizer = AffineQuantizer(name, 64, zero, double, torch.float16)
    codes, scales = quantizer.quantize(weight)
    decoded = quantizer.decode(codes, scales, weight.shape)
    assert bool(decoded.isfinite().all())
    if not double:
        assert not decoded[[0, 1, 2, 4, 5, 6, 7]].any()
        if zero == "float":
            torch.testing.assert_close(decoded[3], weight[3], rtol=2**-10, atol=0)


@pytest.mark.parametrize("name", INTEGERS)
def test_a_zero_point_helps_where_groups_lie_off_zero(name: str) -> None:
    weight = weight_of(48, 320)
    errors = [AffineQuantizer(name, 64, zero).residual(weight, None, torch.empty_like(weight)) for zero in ZERO_POINTS]
    assert errors[2] < errors[1] < errors[0]


def test_bad_input() -> None:
    with pytest.raises(UnknownNameError, match="unknown codebook 'nf4'"):
        AffineQuantizer("nf4")
    with pytest.raises(UnknownNameError, match="unknown zero-point 'none'"):
        AffineQuantizer("int4", 64, "none")
    with pytest.raises(OptionError, match="group size 12 is not a multiple of 8"):
        AffineQuantizer("int4", 12)
