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
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
import torch

from loftq.core.kernels import trellis as loops

LENGTH = 12  # bits of a state
WIDEST = 5  # bits of a weight
_PANEL = 64  # columns that are coded between two matrix products
DISTORTION = (1.0, 0.27, 0.0695, 0.0183, 0.005, 0.0014)  # ρ(b): mean squared errors of a unit Gaussian


@cache
def tables() -> torch.Tensor:
    """The levels of all states for each width from 1 on: float32 (WIDEST, 2^LENGTH)."""
    with resources.files("loftq.core").joinpath("data/trellis.npy").open("rb") as file:
        return torch.from_numpy(np.load(file).astype(np.float32))


@dataclass(frozen=True)
class Trellis:
    """A coded weight: `codes` int32 (words,), `widths` uint8 (in,), `rows` r float16 (out,), `columns` c float16 (in,)."""

    codes: torch.Tensor
    widths: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


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


def decode(code: Trellis) -> torch.Tensor:
    """The weight that a code stands for: float32 (out, in), a view of its transpose."""
    rows, columns = code.rows.float(), code.columns.float()
    out = torch.empty(len(columns), len(rows), dtype=torch.float32)
    loops.decode(
        code.codes.numpy().view(np.uint32),
        offsets(code.widths, len(rows)).numpy(),
        code.widths.numpy(),
        tables().numpy().reshape(-1),
        columns.numpy(),
        rows.numpy(),
        LENGTH,
        out.numpy(),
    )
    return out.T


def encode(
    target: torch.Tensor, widths: torch.Tensor, rows: torch.Tensor, coefficients: torch.Tensor, words: int
) -> Trellis:
    """Code the columns of `target` (out, in), float32, in their order, each with the error of those before fed on.

    `widths` are uint8 (in,), `rows` float16 (out,). Column j is shifted by Σ_i E_i C_ij before it is coded, where E_i
    are the errors of columns i < j, and C (in, in) the `coefficients`, of which only those above the diagonal are used.
    `words` is the number of words of the stream.
    """
    outputs, inputs = target.shape
    scale = rows.float()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    weights = scale.square()
    weights = (weights / weights.mean().clamp(min=1e-38)).numpy()
    codes, places = np.zeros(words, np.uint32), offsets(widths, outputs).tolist()
    columns = torch.zeros(inputs, dtype=torch.float16)
    errors = torch.zeros(inputs, outputs)
    search, levels = loops.Search(outputs, LENGTH), tables()
    for start in range(0, inputs, _PANEL):
        panel = slice(start, min(start + _PANEL, inputs))
        goal = target[:, panel].T.contiguous()  # (width, out)
        x = torch.addmm(goal, coefficients[:start, panel].T, errors[:start])
        within = coefficients[panel, panel]
        for j in range(len(x)):
            width = int(widths[start + j])
            if width:
                y = x[j] * inverse
                spread = float(y.square().mean().sqrt())
                states = search((y / max(spread, 1e-30)).numpy(), weights, levels[width - 1].numpy(), width)
                loops.write(states, width, LENGTH, codes, places[start + j])
                values = scale * levels[width - 1][torch.from_numpy(states).long()]
                energy = float(values.double().square().sum())
                factor = float(values.double() @ x[j].double()) / energy if energy else 0.0
                columns[start + j] = factor
                errors[start + j] = goal[j] - values * float(columns[start + j])
            else:
                errors[start + j] = goal[j]
            x[j + 1 :] += within[j, j + 1 :].unsqueeze(1) * errors[start + j]
    return Trellis(torch.from_numpy(codes.view(np.int32)), widths, rows, columns)
