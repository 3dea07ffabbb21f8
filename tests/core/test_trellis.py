"""Oracles: streams read bit by bit with numpy, all paths of a small trellis, all shares of a small budget, float64.

Covers: loftq/core/trellis_coding.py, loftq/core/kernels/viterbi.py, loftq/core/kernels/trellis_decode.py,
loftq/core/kernels/gpu_trellis.py.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from loftq.core import trellis
from loftq.core.kernels.viterbi import Search
from loftq.core.rounding import output_squared_norm, repayments
from loftq.core.trellis import LENGTHS, WIDEST, TrellisCode, TrellisQuantizer, offsets, share, tables, words_of
from loftq.core.trellis_coding import encode


def words_for(widths: torch.Tensor, outputs: int, length: int = 12) -> int:
    """The words of a stream of given widths, and one more."""
    return -(-sum(int(width) * (outputs - 1) + length for width in widths if width) // 32) + 1


def code(codes: torch.Tensor, scales: trellis.TrellisScales, length: int = 12) -> TrellisCode:
    """Codes and scales as one."""
    return TrellisCode(codes, scales.widths, scales.values, scales.columns, length)


def coded(outputs: int, length: int) -> tuple[torch.Tensor, trellis.TrellisScales]:
    """The codes and the scales of a Gaussian matrix with columns of all widths."""
    torch.manual_seed(0)
    target = torch.randn(outputs, 30) * torch.rand(outputs, 1)
    widths = torch.arange(30, dtype=torch.uint8) % (WIDEST + 1)
    rows = target.square().mean(dim=1).sqrt()
    return encode(target, widths, rows, length, words_for(widths, outputs, length))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("outputs", [1, 2, 7, 8, 33, 300])
@pytest.mark.parametrize("path", ["compiled", "torch", "triton"])
def test_streams_are_what_numpy_reads(outputs: int, path: str, length: int, request: pytest.FixtureRequest) -> None:
    """State t of a column is the window of L bits that begins `width` bits after that of state t - 1."""
    codes, scales = coded(outputs, length)
    if path != "compiled":
        request.getfixturevalue(f"{path}_path")
    bits = np.unpackbits(codes.numpy().view(np.uint8), bitorder="little")
    begins = offsets(scales.widths, outputs, length)
    expected = torch.zeros(outputs, len(scales.widths))
    for j, width in enumerate(scales.widths.tolist()):
        for t in range(outputs) if width else ():
            window = bits[int(begins[j]) + width * t :][:length]
            level = tables(length)[width - 1][int(window @ (1 << np.arange(length)))]
            expected[t, j] = level * scales.columns[j].float() * scales.values[t]
    assert torch.equal(code(codes, scales, length).decode(), expected)
    for part in (slice(0, 1), slice(outputs // 2, outputs), slice(3, 5)):
        assert torch.equal(code(codes, scales, length).decode(part), expected[part])


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_the_path_is_the_best_of_all(width: int) -> None:
    """A trellis of 2^5 states and few steps has few enough paths to try them all, with a weight for each step."""
    length, steps = 5, {1: 7, 2: 5, 3: 4, 4: 3, 5: 3}[width]
    random = np.random.default_rng(width)
    table = random.standard_normal(1 << length).astype(np.float32)
    search = Search(steps, length)
    for _ in range(20):
        x, weights = random.standard_normal(steps).astype(np.float32), random.random(steps).astype(np.float32)
        streams = np.arange(1 << (length + width * (steps - 1)))
        states = np.stack([(streams >> (width * t)) & ((1 << length) - 1) for t in range(steps)], axis=1)
        costs = ((x - table[states]) ** 2 * weights).sum(axis=1)
        path = search(x, weights, table, width)
        assert all(path[t] >> width == path[t + 1] & ((1 << (length - width)) - 1) for t in range(steps - 1))
        assert ((x - table[path]) ** 2 * weights).sum() == pytest.approx(costs.min(), rel=1e-4)


@pytest.mark.parametrize(
    ("length", "width", "most"),
    [
        *((12, 1, 0.278), (12, 2, 0.0735), (12, 3, 0.0193), (12, 4, 0.0053), (12, 5, 0.0015)),
        *((10, 1, 0.288), (10, 2, 0.0785), (10, 3, 0.0208), (10, 4, 0.0057), (10, 5, 0.0017)),
    ],
)
def test_tables_are_near_the_limit_of_a_gaussian(length: int, width: int, most: float) -> None:
    """The mean squared error of Gaussian samples; the limit is 4^-b, and a table of 2 or 4 levels has 0.363, 0.117."""
    samples, levels = np.random.default_rng(9).standard_normal(1 << 14).astype(np.float32), tables(length)[width - 1]
    path = Search(len(samples), length)(samples, np.ones_like(samples), levels.numpy(), width)
    error = float(np.mean((samples - levels.numpy()[path]) ** 2))
    assert 4.0**-width < error < most
    assert error == pytest.approx(trellis.DISTORTION[width], rel=0.05 if length == 12 else 0.2)


@pytest.mark.parametrize(("length", "widest"), [(12, 1.05), (10, 1.06)])
def test_tables_are_levels_of_sixteen_bits(length: int, widest: float) -> None:
    """They are shipped in float16, for each width 2^L levels with a mean of 0 and nearly the spread of a Gaussian."""
    levels = tables(length)
    assert levels.shape == (WIDEST, 1 << length)
    assert torch.equal(levels, levels.half().float())
    assert all(abs(float(row.mean())) < 0.01 and 0.7 < float(row.std()) < widest for row in levels)


@pytest.mark.parametrize("seed", range(5))
def test_bits_go_where_they_help_most(seed: int) -> None:
    """The least sum of costs over all shares of the budget."""
    torch.manual_seed(seed)
    importance = torch.rand(5).double() ** 4
    rho = torch.tensor(trellis.DISTORTION, dtype=torch.float64)
    for budget in (0.2, 1.0, 1.5, 2.25, 3.2):
        widths = share(importance, budget)
        assert int(widths.sum()) == trellis.total_bits(5, budget) == int(budget * 5 + 1e-6)
        totals = [
            float((importance * rho[list(other)]).sum())
            for other in itertools.product(range(WIDEST + 1), repeat=5)
            if sum(other) == int(widths.sum())
        ]
        assert float((importance * rho[widths.long()]).sum()) == pytest.approx(min(totals), rel=1e-12)


def test_the_stream_has_the_planned_length() -> None:
    """Whatever the widths of columns are, the words of a budget hold their streams."""
    torch.manual_seed(0)
    for outputs, inputs, budget in ((1, 8, 1.5), (40, 24, 2.25), (33, 16, 4.0)):
        for importance in (torch.ones(inputs), torch.rand(inputs) ** 8, torch.eye(inputs)[0]):
            widths = share(importance, budget)
            assert words_for(widths, outputs) <= words_of((outputs, inputs), budget, 12)


def test_feedback_is_worth_what_the_formula_says() -> None:
    """tr(E H Eᵀ) = Σ D_j |x_j − q_j|², and less than without feedback."""
    torch.manual_seed(0)
    inputs = torch.randn(200, 24) @ torch.randn(24, 24)
    moment = (inputs.T @ inputs / 200).double() + 0.1 * torch.eye(24)
    target = torch.randn(96, 24)
    feed, costs = repayments(moment)
    widths, rows = torch.full((24,), 2, dtype=torch.uint8), target.square().mean(dim=1).sqrt()
    errors = []
    for coefficients in (None, feed):
        found = encode(target, widths, rows, 12, words_for(widths, 96), coefficients)
        errors.append(target - code(*found).decode())
    apart, fed = (output_squared_norm(error, moment) for error in errors)
    assert fed < 0.9 * apart
    shifted = errors[1].double() @ (torch.eye(24) + feed.double())  # x_j − q_j
    assert fed == pytest.approx(float((shifted.square().sum(dim=0) * costs).sum()), rel=1e-4)


def test_a_zero_weight_is_zero() -> None:
    """Rows and columns of zeros too."""
    target = torch.randn(20, 8)
    target[3], target[:, 5] = 0, 0
    for weight in (target, torch.zeros(20, 8)):
        codes, scales = encode(
            weight, torch.full((8,), 2, dtype=torch.uint8), weight.square().mean(dim=1).sqrt(), 12, 40
        )
        read = TrellisQuantizer(2, 12).decode(codes, scales, weight.shape)
        assert bool(torch.isfinite(read).all())
        assert not read[weight.square().sum(dim=1) == 0].any()
        assert not read[:, weight.square().sum(dim=0) == 0].any()


@pytest.mark.parametrize("length", LENGTHS)
def test_coding_on_a_gpu_gives_the_same_codes(length: int, request: pytest.FixtureRequest) -> None:
    """With errors fed on, and columns of all widths. Columns of more outputs than a chunk may differ."""
    torch.manual_seed(0)
    target, feed = torch.randn(12, 6), 0.2 * torch.randn(6, 6)
    rows, widths = target.square().mean(dim=1).sqrt(), torch.arange(6, dtype=torch.uint8)
    arguments = target, widths, rows, length, words_for(widths, 12, length), feed
    codes, scales = encode(*arguments)
    request.getfixturevalue("triton_path")
    again, same = encode(*arguments)
    assert torch.equal(again, codes)
    assert torch.equal(same.columns, scales.columns)
