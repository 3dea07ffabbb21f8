"""QA-LoRA's algebra: the merge identity, its plain form, and what the initialization minimizes.

Covers: loftq/core/solvers/pooled.py.
"""

from __future__ import annotations

import pytest
import torch

from loftq.core import pooled
from loftq.core.affine import AffineQuantizer, AffineWeight
from loftq.core.kernels import dispatch
from loftq.core.packing import single
from loftq.core.scales import Scales
from loftq.core.solvers.pooled import solve_pooled
from loftq.errors import OptionError

KINDS = [(bits, zero) for bits in (2, 3, 4, 8) for zero in ("symmetric", "integer", "float")]


def weight_of(rows: int = 96, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """Noise and a part that is constant within groups of 32."""
    generator = torch.Generator().manual_seed(seed)
    constant = torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns // 32, generator=generator)
    return torch.randn(rows, columns, generator=generator) + 0.3 * constant.repeat_interleave(32, dim=1)


def factors_of(rows: int, pools: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rank, pools, generator=generator).double(), torch.randn(rows, rank, generator=generator).double()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "pool"), [(32, 32), (32, 64), (64, 128), (16, 16)])
def test_the_merge_identity(bits: int, group: int, pool: int) -> None:
    """Oracle: the paper's pooled forward in peft's convention, on inputs, in float64. Codes and scales stay."""
    weight, scaling = weight_of(), 0.5
    codes, scales = AffineQuantizer(f"int{bits}", group, "float").quantize(weight)
    before = AffineWeight.of(codes, scales, (96, 256), bits)
    exact = AffineWeight(before.codes, before.scales.double(), before.shifts.double(), bits)
    a, b = factors_of(96, 256 // pool)
    merged = pooled.merge_correction(exact, pooled.correction(a, b, scaling, pool))
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(9)).double()
    means = x.view(7, 256 // pool, pool).mean(dim=2) * (256 // pool)
    wanted = x @ exact.decode(torch.float64).T + scaling * means @ a.T @ b.T
    found = x @ merged.decode(torch.float64).T
    assert float((found - wanted).abs().max()) < 1e-10
    assert merged.codes is exact.codes
    assert merged.scales is exact.scales

    plain = x @ exact.decode(torch.float64).T + scaling * x @ pooled.plain_lora(a, pool).T @ b.T
    assert float((plain - wanted).abs().max()) < 1e-10


def test_pools_of_broken_groups_are_refused() -> None:
    codes, scales = AffineQuantizer("int4", 64, "float").quantize(weight_of())
    with pytest.raises(OptionError, match="not made of whole groups"):
        pooled.merge_correction(AffineWeight.of(codes, scales, (96, 256), 4), torch.zeros(96, 8))


@pytest.mark.parametrize(("bits", "zero"), KINDS)
def test_a_fit_is_least_squares(bits: int, zero: str) -> None:
    """Oracle: numpy's least squares for the codes of each group, in float64."""
    import numpy as np

    weight = weight_of(8, 64)
    quantizer = AffineQuantizer(f"int{bits}", 32, zero)
    scales = quantizer.scales(weight)
    if zero == "float":
        scales = Scales(scales.values * 0.9, None, scales.shifts + 0.1)
    levels = single(quantizer.encode(weight, scales), bits).view(-1, 32).double().numpy() - 2 ** (bits - 1)
    fitted = quantizer.refit(weight, scales)
    for group, (row, values) in enumerate(zip(levels, weight.view(-1, 32).double().numpy(), strict=True)):
        if zero == "float":
            slope, shift = np.linalg.lstsq(np.stack([row, np.ones(32)], axis=1), values, rcond=None)[0]
            assert float(fitted.values[group]) == pytest.approx(slope, rel=1e-4)
            assert float(fitted.shifts[group]) == pytest.approx(shift, rel=1e-3, abs=1e-3)  # stored in 16 bits
        else:
            origin = 0.0 if zero == "symmetric" else float(scales.zeros[group]) - 2 ** (bits - 1)
            slope = float(((row - origin) * values).sum() / ((row - origin) ** 2).sum())
            assert float(fitted.values[group]) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(("bits", "zero"), KINDS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_the_trace_is_what_the_returned_tensors_leave(bits: int, zero: str, scale_dtype: torch.dtype) -> None:
    """Oracle: decoded weight plus ΔW, in float64. Each step leaves no more than the one before."""
    weight, scaling, pool = weight_of(), 2.0, 64
    quantizer = AffineQuantizer(f"int{bits}", 32, zero, scale_dtype=scale_dtype)
    solution = solve_pooled(weight, quantizer, 3, 5, scaling, pool)
    trace = solution.trace
    rounded = quantizer.decode(solution.codes, solution.scales, weight.shape).double()
    delta = pooled.spread(pooled.correction(solution.a.double(), solution.b.double(), scaling, pool), pool)
    assert float((weight - rounded - delta).norm()) == pytest.approx(trace.final, rel=1e-4)
    assert trace.weight == pytest.approx(float(weight.double().norm()), rel=1e-6)
    steps = [trace.plain, trace.refit, trace.final]
    assert steps == sorted(steps, reverse=True)
    assert trace.refit < trace.plain
    assert (solution.a.shape, solution.b.shape) == ((3, 4), (96, 3))
    if zero == "float":
        assert not solution.b.any()  # nothing constant is left for it
        assert not trace.iterations
    elif bits < 8:
        assert trace.final < trace.refit
        assert list(trace.iterations) == sorted(trace.iterations, reverse=True)


def test_the_first_adapter_is_the_closed_form() -> None:
    """Oracle: the SVD of the pooled means of what the fitted rounding leaves, by numpy in float64."""
    weight, pool = weight_of(), 32
    quantizer = AffineQuantizer("int3", 32, "integer")
    solution = solve_pooled(weight, quantizer, 2, 1, 1.0, pool)
    rounded = quantizer.decode(solution.codes, solution.scales, weight.shape).double()
    means = (weight - rounded).view(96, -1, pool).mean(dim=2)
    u, s, v = torch.linalg.svd(means)
    best = u[:, :2] * s[:2] @ v[:2]
    found = pooled.correction(solution.a.double(), solution.b.double(), 1.0, pool)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-6)


def test_no_iterations_is_plain_rounding() -> None:
    weight, quantizer = weight_of(), AffineQuantizer("int4", 32, "integer")
    solution = solve_pooled(weight, quantizer, 2, 0, 1.0, 32)
    assert torch.equal(solution.codes, quantizer.quantize(weight)[0])
    assert not solution.b.any()
    assert solution.trace.final == solution.trace.plain == solution.trace.refit


@pytest.mark.parametrize(("bits", "zero"), KINDS)
def test_torch_path_equals_compiled_path(bits: int, zero: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the compiled loops, to the order of sums."""
    weight, quantizer = weight_of(), AffineQuantizer(f"int{bits}", 32, zero)
    scales = quantizer.scales(weight)
    compiled = quantizer.refit(weight, scales)
    monkeypatch.setattr(dispatch, "on_cpu", lambda _: False)
    monkeypatch.setattr(dispatch, "CHUNK", 1 << 11)
    found = quantizer.refit(weight, scales)
    torch.testing.assert_close(found.values, compiled.values, rtol=1e-5, atol=0)
    if zero == "float":
        torch.testing.assert_close(found.shifts, compiled.shifts, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_does_not_fit(rank: int) -> None:
    with pytest.raises(OptionError, match="smaller side of 96 x 8 pools"):
        solve_pooled(weight_of(), AffineQuantizer("int4", 32), rank, 1, 1.0, 32)
