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

from loftq.core.kernels import dispatch, trellis_decode
from loftq.core.kernels.compiled import lent
from loftq.core.scales import Scales

LENGTH = 12  # bits of a state
WIDEST = 5  # bits of a weight
FEW = 4  # vectors up to which a product needs no decoded weight
DISTORTION = (1.0, 0.27, 0.0695, 0.0183, 0.005, 0.0014)  # ρ(b): mean squared errors of a unit Gaussian


@cache
def tables() -> torch.Tensor:
    """The levels of all states for each width from 1 on: float32 (WIDEST, 2^LENGTH)."""
    with resources.files("loftq.core").joinpath("data/trellis.npy").open("rb") as file:
        return torch.from_numpy(np.load(file).astype(np.float32))


@cache
def tables_on(device: torch.device) -> torch.Tensor:
    """The same on a device."""
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
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight that a code stands for: (out, in) of `dtype`, a view of its transpose; or only some of its `outputs`.

    `codes` are int32 (words,), `widths` uint8 (in,), `rows` float32 (out,), `columns` float16 (in,).
    """
    begins = offsets(widths, len(rows))
    first, last, _ = (outputs or slice(None)).indices(len(rows))
    begins, rows = begins + first * widths.long(), rows[first:last].float().contiguous()
    shape = len(columns), len(rows)
    if dispatch.on_cpu(codes):
        out = torch.empty(shape, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
        target = out.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else out.numpy()
        trellis_decode.decode(_arrays(codes, begins, widths, rows, columns), target)
    elif dispatch.on_gpu(codes):
        from loftq.core.kernels import gpu_trellis

        out = torch.empty(shape, dtype=dtype, device=codes.device)
        gpu_trellis.decode(codes, begins, widths, tables_on(codes.device), columns, rows, LENGTH, out)
    else:
        out, levels = torch.empty(shape, dtype=dtype, device=codes.device), tables_on(codes.device)
        step = max(dispatch.CHUNK // max(len(rows), 1), 1)
        for some in (slice(at, at + step) for at in range(0, len(columns), step)):
            values = _decode_columns(codes, begins[some], widths[some], levels, len(rows))
            out[some] = values * columns[some].float().unsqueeze(1) * rows
    return out.to(dtype).T


def multiplies(codes: torch.Tensor) -> bool:
    """Whether there is `multiply` for the device of a code."""
    return dispatch.on_cpu(codes) or dispatch.on_gpu(codes)


def multiply(
    codes: torch.Tensor, widths: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """The product x Wᵀ of a few vectors x (vectors, in) with a coded weight: (vectors, out) in the dtype of x.

    The weight is not decoded as a whole. Sums are in float32.
    """
    begins = offsets(widths, len(rows))
    if dispatch.on_gpu(codes):
        from loftq.core.kernels import gpu_trellis

        coded = (codes, begins, widths, tables_on(codes.device), columns, rows.float().contiguous(), LENGTH)
        return gpu_trellis.multiply(*coded, x=x.contiguous())
    found = trellis_decode.multiply(_arrays(codes, begins, widths, rows, columns), x.float().contiguous().numpy())
    return torch.from_numpy(found).to(x.dtype)


def multiply_back(
    codes: torch.Tensor, widths: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """The product x W of a few vectors x (vectors, out) with a coded weight: (vectors, in) in the dtype of x."""
    begins = offsets(widths, len(rows))
    if dispatch.on_gpu(codes):
        from loftq.core.kernels import gpu_trellis

        coded = (codes, begins, widths, tables_on(codes.device), columns, rows.float().contiguous(), LENGTH)
        return gpu_trellis.multiply_back(*coded, x=x.contiguous())
    found = trellis_decode.multiply_back(_arrays(codes, begins, widths, rows, columns), x.float().contiguous().numpy())
    return torch.from_numpy(found).to(x.dtype)


def _arrays(
    codes: torch.Tensor, begins: torch.Tensor, widths: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> trellis_decode.Coded:
    """A coded weight for the compiled loops."""
    return trellis_decode.Coded(
        lent(codes).view(np.uint32),
        begins.numpy(),
        widths.numpy(),
        tables().numpy().reshape(-1),
        columns.float().numpy(),
        rows.float().contiguous().numpy(),
        LENGTH,
    )


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
