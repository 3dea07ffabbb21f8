"""Rounding a weight that gets no adapter. Oracle: tr(E H Eᵀ) in float64, and plain GPTQ's column by column rounding."""

from __future__ import annotations

import pytest
import torch

from loftq.core.affine import AffineQuantizer
from loftq.core.metric import damped
from loftq.core.solvers.rounded import round_weight


def problem(rows: int = 24, columns: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the moment of inputs that are correlated and of very different sizes."""
    weight = torch.randn(rows, columns) * 0.02
    inputs = torch.randn(600, columns) @ torch.randn(columns, columns) * torch.logspace(-1, 1, columns)
    return weight, inputs.T @ inputs / len(inputs)


def output_error(weight: torch.Tensor, found: torch.Tensor, moment: torch.Tensor) -> float:
    error = weight.double() - found.double()
    return float(((error @ moment.double()) * error).sum())


def gptq(weight: torch.Tensor, quantizer: AffineQuantizer, moment: torch.Tensor) -> torch.Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1) in float64 with the Cholesky factor of H⁻¹, under the range's scales."""
    scales = quantizer.scales(weight)
    size = quantizer.block_size
    step, shift = (
        each.view(len(weight), -1).repeat_interleave(size, dim=1) for each in (scales.values, scales.offsets)
    )
    upper = torch.linalg.cholesky(torch.linalg.inv(moment.double()), upper=True)
    left, rounded = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    half = 2 ** (quantizer.bits - 1)
    for j in range(weight.shape[1]):
        level = ((left[:, j] - shift[:, j]) / step[:, j]).round().clamp(-half, half - 1)
        rounded[:, j] = level * step[:, j] + shift[:, j]
        error = (left[:, j] - rounded[:, j]) / upper[j, j]
        left[:, j:] -= error.unsqueeze(1) * upper[j, j:]
    return rounded


@pytest.mark.parametrize("zero_point", ["symmetric", "integer"])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_worse_than_gptq(bits: int, zero_point: str) -> None:
    weight, moment = problem()
    quantizer = AffineQuantizer(f"int{bits}", 32, zero_point, scale_dtype=torch.bfloat16)
    h = damped(moment)
    found = quantizer.decode(*round_weight(weight, quantizer, moment), weight.shape)
    plain = quantizer.decode(*round_weight(weight, quantizer), weight.shape)
    assert torch.equal(plain, quantizer.decode(*quantizer.quantize(weight), weight.shape))
    theirs = output_error(weight, gptq(weight, quantizer, h), h)
    assert output_error(weight, found, h) < theirs < output_error(weight, plain, h)


def test_scales_are_stored_in_their_dtype_whatever_the_unit() -> None:
    """Oracle: the solution of the weight times a power of four."""
    weight, moment = problem()
    quantizer = AffineQuantizer("int4", 32, "integer", scale_dtype=torch.bfloat16)
    codes, scales = round_weight(weight, quantizer, moment)
    large, times = round_weight(weight * 4.0**30, quantizer, moment)
    assert torch.equal(scales.values, scales.values.bfloat16().float())
    assert torch.equal(codes, large)
    assert torch.equal(scales.values * 4.0**30, times.values)
    assert torch.equal(scales.zeros, times.zeros)
