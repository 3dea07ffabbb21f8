"""Trellis-coded quantization: each column of a weight is one path through a trellis (QTIP, arXiv 2406.11235).

For input j and output t of a weight (out, in),

    w[t, j] = r[t] · c[j] · table_b[state_j(t)],       state_j(t) = bits [b·t, b·t + L) of the column's stream,

with b = b_j bits a weight in column j. A window of L bits moves by b bits from one output to the next, so 2^b states
can follow each state (a bitshift trellis), and any weight can be decoded without those before it. Viterbi's algorithm
finds the path with the least squared error. The levels of 2^L states approach the rate-distortion limit of a Gaussian,
4^−b: at 2 bits and L = 12 the mean squared error of a unit Gaussian is 0.07, where the limit is 0.0625, and the best
table of four levels has 0.117.

A column of no bits is zero. Widths differ from column to column, so a weight can have any budget of bits. With D_j the
cost of an error in column j, and ρ(b) the squared error of b bits in a unit Gaussian, the widths that minimize

    Σ_j D_j ρ(b_j)   subject to   Σ_j b_j ≤ budget · in

are found by giving bits one by one to where they help most, since each bit of a column helps less than the one before
(reverse water-filling, as in WaterSIC, arXiv 2603.04956).

The streams of all columns follow one another in little-endian 32-bit words. A decoder reads two words at once, so one
word follows the last column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import cast

import numpy as np
import torch

from loftq.core.kernels import dispatch, viterbi
from loftq.core.kernels.compiled import lent
from loftq.core.scales import Scales

LENGTH = 12  # bits of a state
WIDEST = 5  # bits of a weight
_PANEL = 64  # columns that are coded between two matrix products
_TINY = 1e-30
_LARGEST = torch.finfo(torch.float16).max
DISTORTION = (1.0, 0.27, 0.0695, 0.0183, 0.005, 0.0014)  # ρ(b): mean squared errors of a unit Gaussian


@cache
def tables() -> torch.Tensor:
    """The levels of all states for each width from 1 on: float32 (WIDEST, 2^LENGTH)."""
    with resources.files("loftq.core").joinpath("data/trellis.npy").open("rb") as file:
        return torch.from_numpy(np.load(file).astype(np.float32))


@cache
def _tables_on(device: torch.device) -> torch.Tensor:
    return tables().to(device)


@dataclass(frozen=True)
class TrellisScales(Scales):
    """The scales r of rows (`values`, float32 (out,)) and c of `columns` (float16 (in,)), and the columns' `widths`.

    `widths` are uint8 (in,).
    """

    columns: torch.Tensor = field(kw_only=True)
    widths: torch.Tensor = field(kw_only=True)


@dataclass(frozen=True)
class TrellisQuantizer:
    """A budget of bits a weight, which the columns of a weight share."""

    bits: float

    @property
    def levels(self) -> torch.Tensor:
        """The least and the largest level of all tables: float32 (2,)."""
        return torch.stack(torch.aminmax(tables()))

    def decode(self, codes: torch.Tensor, scales: Scales, shape: torch.Size) -> torch.Tensor:
        """The values that codes stand for: float32 of `shape`, a view of its transpose."""
        own = cast(TrellisScales, scales)
        return decode(codes, own.widths, own.values, own.columns).view(shape)


def offsets(widths: torch.Tensor, outputs: int) -> torch.Tensor:
    """The first bit of each column's stream: int64 (in,)."""
    sizes = torch.tensor([_stream(width, outputs) for width in range(WIDEST + 1)], device=widths.device)
    counts = sizes[widths.long()]
    return counts.cumsum(0) - counts


def _stream(width: int, outputs: int) -> int:
    """Number of bits of a column."""
    return width * (outputs - 1) + LENGTH if width else 0


def words_of(shape: Sequence[int], budget: float) -> int:
    """Number of 32-bit words that hold any weight (out, in) of a budget, and one word more for the decoder."""
    outputs, inputs = shape
    return -(-(total_bits(inputs, budget) * (outputs - 1) + LENGTH * inputs) // 32) + 1


def total_bits(inputs: int, budget: float) -> int:
    """The sum of all columns' widths."""
    return int(budget * inputs + 1e-6)


def share(importance: torch.Tensor, budget: float) -> torch.Tensor:
    """The width of each column: uint8 (in,). `importance` is D (in,), what the column costs if it is zero."""
    rho = torch.tensor(DISTORTION, dtype=torch.float64)
    gains = importance.double().cpu().unsqueeze(1) * (rho[:-1] - rho[1:])  # (in, widths)
    order = torch.sort(gains.view(-1), descending=True, stable=True).indices
    given = torch.zeros(gains.numel(), dtype=torch.uint8)
    given[order[: total_bits(len(importance), budget)]] = 1
    return given.view_as(gains).sum(dim=1).to(torch.uint8)


def decode(
    codes: torch.Tensor,
    widths: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    outputs: slice | None = None,
) -> torch.Tensor:
    """The weight that a code stands for: float32 (out, in), a view of its transpose; or only some of its `outputs`.

    `codes` are int32 (words,), `widths` uint8 (in,), `rows` float32 (out,), `columns` float16 (in,).
    """
    begins = offsets(widths, len(rows))
    first, last, _ = (outputs or slice(None)).indices(len(rows))
    begins, rows = begins + first * widths.long(), rows[first:last]
    out = torch.empty(len(columns), len(rows), dtype=torch.float32, device=codes.device)
    if dispatch.on_cpu(codes):
        arrays = (lent(codes).view(np.uint32), begins.numpy(), widths.numpy(), tables().numpy().reshape(-1))
        viterbi.decode(*arrays, columns.float().numpy(), rows.float().contiguous().numpy(), LENGTH, out.numpy())
    elif dispatch.on_gpu(codes):
        from loftq.core.kernels import gpu_trellis

        levels = _tables_on(codes.device)
        gpu_trellis.decode(codes, begins, widths, levels, columns, rows.float().contiguous(), LENGTH, out)
    else:
        levels = _tables_on(codes.device)
        step = max(dispatch.CHUNK // max(len(rows), 1), 1)
        for some in (slice(at, at + step) for at in range(0, len(columns), step)):
            values = _decode_columns(codes, begins[some], widths[some], levels, len(rows))
            out[some] = values * columns[some].float().unsqueeze(1) * rows.float()
    return out.T


def _decode_columns(
    codes: torch.Tensor, begins: torch.Tensor, widths: torch.Tensor, levels: torch.Tensor, outputs: int
) -> torch.Tensor:
    """The levels of some columns before scales: float32 (columns, outputs). By torch alone, on any device."""
    steps = torch.arange(outputs, device=codes.device)
    bit = begins.unsqueeze(1) + widths.long().unsqueeze(1) * steps  # (columns, outputs)
    word = bit >> 5
    low, high = (codes[place].long() & 0xFFFFFFFF for place in (word, (word + 1).clamp(max=len(codes) - 1)))
    shift = bit & 31
    window = (low >> shift) | (high << (32 - shift))
    states = window & ((1 << LENGTH) - 1)
    values = levels[(widths.long() - 1).clamp(min=0).unsqueeze(1), states]
    return torch.where(widths.unsqueeze(1) > 0, values, 0)


def encode(
    target: torch.Tensor,
    widths: torch.Tensor,
    rows: torch.Tensor,
    words: int,
    coefficients: torch.Tensor | None = None,
) -> tuple[torch.Tensor, TrellisScales]:
    """Code the columns of `target` (out, in), float32, in their order, each with the errors of those before fed on.

    `widths` are uint8 (in,), and `rows` float32 (out,) the scales of rows. With `coefficients` C (in, in), of which
    those above the diagonal count, column j is shifted by Σ_i E_i C_ij before it is coded, where E_i are the errors
    of the columns i < j. `words` is the length of the stream. Returns codes, int32 (words,), and scales.
    """
    device = target.device
    target, rows, widths = target.cpu(), rows.cpu(), widths.cpu()
    feed = None if coefficients is None else coefficients.cpu()
    coder = _ColumnCoder(rows, words)
    begins = offsets(widths, len(rows)).tolist()
    columns = torch.zeros(target.shape[1], dtype=torch.float16)
    errors = torch.zeros(target.shape[::-1])
    for start in range(0, target.shape[1], _PANEL):
        panel = slice(start, min(start + _PANEL, target.shape[1]))
        goal = target[:, panel].T.contiguous()  # (width of the panel, out)
        x = goal if feed is None else torch.addmm(goal, feed[:start, panel].T, errors[:start])
        for j in range(len(x)):
            at = start + j
            columns[at], coded = coder(x[j], int(widths[at]), begins[at])
            errors[at] = goal[j] - coded
            if feed is not None:
                x[j + 1 :] += feed[at, at + 1 : panel.stop].unsqueeze(1) * errors[at]
    codes = torch.from_numpy(coder.words.view(np.int32)).to(device)
    return codes, TrellisScales(rows.to(device), columns=columns.to(device), widths=widths.to(device))


class _ColumnCoder:
    """Codes one column after the other into a stream. Errors count as they are in the weight, not relative to rows."""

    def __init__(self, rows: torch.Tensor, words: int) -> None:
        self.words = np.zeros(words, np.uint32)
        self._rows = rows
        self._inverse = torch.where(rows > 0, 1 / rows, 0.0)
        weights = rows.square()
        self._weights = (weights / weights.mean().clamp(min=_TINY)).numpy()
        self._search = viterbi.Search(len(rows), LENGTH)

    def __call__(self, x: torch.Tensor, width: int, begin: int) -> tuple[float, torch.Tensor]:
        """Code `x` (out,), write its stream from bit `begin` on, and return its scale and its coded values."""
        if width == 0:
            return 0.0, torch.zeros_like(x)
        unit = x * self._inverse
        spread = unit.square().mean().sqrt().clamp(min=_TINY)
        levels = tables()[width - 1]
        states = self._search((unit / spread).numpy(), self._weights, levels.numpy(), width)
        viterbi.write_stream(states, width, LENGTH, self.words, begin)
        values = self._rows * levels[torch.from_numpy(states).long()]
        energy = float(values.double().square().sum())
        best = float(values.double() @ x.double()) / energy if energy else 0.0  # the least squares fit
        scale = float(torch.tensor(best).clamp(-_LARGEST, _LARGEST).half())
        return scale, values * scale
