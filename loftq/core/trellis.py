"""Trellis-coded quantization: each column of a weight is one path through a trellis (QTIP, arXiv 2406.11235).

For input j and output t of a weight (out, in),

    w[t, j] = r[t] · c[j] · table_b[state_j(t)],       state_j(t) = bits [b·t, b·t + L) of the column's stream,

with b = b_j bits a weight in column j. A window of L bits moves by b bits from one output to the next, so 2^b states
can follow each state (a bitshift trellis), and any weight can be decoded without those before it. Viterbi's algorithm
finds the path with the least squared error. The levels of 2^L states approach the rate-distortion limit of a Gaussian,
4^−b: at 2 bits the mean squared error of a unit Gaussian is 0.070 with L = 12 and 0.076 with L = 10, where the limit
is 0.0625, and the best table of four levels has 0.117. Coding takes time in proportion to the number of states.

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
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import cast

import numpy as np
import torch

from loftq.core.kernels import dispatch, trellis_decode
from loftq.core.kernels.compiled import lent
from loftq.core.scales import Scales

LENGTHS = (10, 12)  # bits of a state
WIDEST = 5  # bits of a weight
FEW = 4  # vectors up to which a product needs no decoded weight
DISTORTION = (1.0, 0.27, 0.0695, 0.0183, 0.005, 0.0014)  # ρ(b): mean squared errors of a unit Gaussian


@cache
def tables(length: int) -> torch.Tensor:
    """The levels of all states of `length` bits for each width from 1 on: float32 (WIDEST, 2^length)."""
    with resources.files("loftq.core").joinpath(f"data/trellis-{length}.npy").open("rb") as file:
        return torch.from_numpy(np.load(file).astype(np.float32))


@cache
def tables_on(device: torch.device, length: int) -> torch.Tensor:
    """The same on a device."""
    return tables(length).to(device)


@dataclass(frozen=True)
class TrellisScales(Scales):
    """The scales r of rows (`values`, float32 (out,)) and c of `columns` (float16 (in,)), and the columns' `widths`.

    `widths` are uint8 (in,).
    """

    columns: torch.Tensor = field(kw_only=True)
    widths: torch.Tensor = field(kw_only=True)


@dataclass(frozen=True)
class TrellisQuantizer:
    """A budget of bits a weight, which the columns of a weight share, and the number L of bits of a state."""

    bits: float
    length: int = 12

    @property
    def levels(self) -> torch.Tensor:
        """The least and the largest level of all tables: float32 (2,)."""
        return torch.stack(torch.aminmax(tables(self.length)))

    def decode(self, codes: torch.Tensor, scales: Scales, shape: torch.Size) -> torch.Tensor:
        """The values that codes stand for: float32 of `shape`, a view of its transpose."""
        own = cast(TrellisScales, scales)
        return TrellisCode(codes, own.widths, own.values, own.columns, self.length).decode().view(shape)


def offsets(widths: torch.Tensor, outputs: int, length: int) -> torch.Tensor:
    """The first bit of each column's stream: int64 (in,)."""
    sizes = torch.tensor([_stream(width, outputs, length) for width in range(WIDEST + 1)], device=widths.device)
    counts = sizes[widths.long()]
    return counts.cumsum(0) - counts


def _stream(width: int, outputs: int, length: int) -> int:
    """Number of bits of a column."""
    return width * (outputs - 1) + length if width else 0


def words_of(shape: Sequence[int], budget: float, length: int) -> int:
    """Number of 32-bit words that hold any weight (out, in) of a budget, and one word more for the decoder."""
    outputs, inputs = shape
    return -(-(total_bits(inputs, budget) * (outputs - 1) + length * inputs) // 32) + 1


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


def multiplies(codes: torch.Tensor) -> bool:
    """Whether a code on its device can be multiplied without being decoded."""
    return dispatch.on_cpu(codes) or dispatch.on_gpu(codes)


_OnGpu = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]


@dataclass(frozen=True)
class TrellisCode:
    """A coded weight (out, in).

    `codes` are int32 (words,), `widths` uint8 (in,), `rows` float32 (out,), `columns` float16 (in,). A state has
    `length` bits.
    """

    codes: torch.Tensor
    widths: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    length: int

    def decode(self, outputs: slice | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight: (out, in) of `dtype`, a view of its transpose; or only some of its `outputs`."""
        first, last, _ = (outputs or slice(None)).indices(len(self.rows))
        begins = offsets(self.widths, len(self.rows), self.length) + first * self.widths.long()
        some = replace(self, rows=self.rows[first:last])
        shape = len(self.columns), len(some.rows)
        if dispatch.on_cpu(self.codes):
            out = torch.empty(shape, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
            target = out.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else out.numpy()
            trellis_decode.decode(some._arrays(begins), target)
        elif dispatch.on_gpu(self.codes):
            from loftq.core.kernels import gpu_trellis

            out = torch.empty(shape, dtype=dtype, device=self.codes.device)
            gpu_trellis.decode(*some._tensors(begins), out)
        else:
            out = torch.empty(shape, dtype=dtype, device=self.codes.device)
            step = max(dispatch.CHUNK // max(len(some.rows), 1), 1)
            for chosen in (slice(at, at + step) for at in range(0, len(self.columns), step)):
                values = some._decode_columns(begins, chosen)
                out[chosen] = values * self.columns[chosen].float().unsqueeze(1) * some.rows.float()
        return out.to(dtype).T

    def multiply(self, x: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """The product x Wᵀ of a few vectors x (vectors, in), or x W of vectors (vectors, out) if `back`.

        It has the dtype of x, and sums are in float32. The weight is not decoded as a whole.
        """
        begins = offsets(self.widths, len(self.rows), self.length)
        if dispatch.on_gpu(self.codes):
            from loftq.core.kernels import gpu_trellis

            on_gpu = gpu_trellis.multiply_back if back else gpu_trellis.multiply
            return on_gpu(*self._tensors(begins), x=x.contiguous())
        on_cpu = trellis_decode.multiply_back if back else trellis_decode.multiply
        return torch.from_numpy(on_cpu(self._arrays(begins), x.float().contiguous().numpy())).to(x.dtype)

    def _tensors(self, begins: torch.Tensor) -> _OnGpu:
        """What the kernels of a GPU take."""
        levels = tables_on(self.codes.device, self.length)
        return self.codes, begins, self.widths, levels, self.columns, self.rows.float().contiguous(), self.length

    def _arrays(self, begins: torch.Tensor) -> trellis_decode.Coded:
        """What the compiled loops take."""
        return trellis_decode.Coded(
            lent(self.codes).view(np.uint32),
            begins.numpy(),
            self.widths.numpy(),
            tables(self.length).numpy().reshape(-1),
            self.columns.float().numpy(),
            self.rows.float().contiguous().numpy(),
            self.length,
        )

    def _decode_columns(self, begins: torch.Tensor, chosen: slice) -> torch.Tensor:
        """The levels of some columns before scales: float32 (columns, outputs). By torch alone, on any device."""
        widths, levels = self.widths[chosen].long(), tables_on(self.codes.device, self.length)
        steps = torch.arange(len(self.rows), device=self.codes.device)
        bit = begins[chosen].unsqueeze(1) + widths.unsqueeze(1) * steps  # (columns, outputs)
        word = bit >> 5
        low, high = (
            self.codes[place].long() & 0xFFFFFFFF for place in (word, (word + 1).clamp(max=len(self.codes) - 1))
        )
        shift = bit & 31
        window = (low >> shift) | (high << (32 - shift))
        states = window & ((1 << self.length) - 1)
        values = levels[(widths - 1).clamp(min=0).unsqueeze(1), states]
        return torch.where(widths.unsqueeze(1) > 0, values, 0)
