"""Coding a weight column by column into a trellis code (`core.trellis`), on the CPU or on a GPU.

Columns follow one another, because the errors of each shift those after it. Everything stays on the device of the
weight, and the states of a panel of columns are written to the stream at once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from loftq.core.kernels import dispatch, viterbi
from loftq.core.trellis import TrellisScales, offsets, tables_on

_PANEL = 64  # columns that are coded between two matrix products
_TINY = 1e-30
_LARGEST = torch.finfo(torch.float16).max


def encode(
    target: torch.Tensor,
    widths: torch.Tensor,
    rows: torch.Tensor,
    length: int,
    words: int,
    coefficients: torch.Tensor | None = None,
) -> tuple[torch.Tensor, TrellisScales]:
    """Code the columns of `target` (out, in), float32, in their order, each with the errors of those before fed on.

    `widths` are uint8 (in,), `rows` float32 (out,) the scales of rows, and a state has `length` bits. With
    `coefficients` C (in, in), of which those above the diagonal count, column j is shifted by Σ_i E_i C_ij before it is
    coded, where E_i are the errors of the columns i < j. `words` is the length of the stream. Returns codes, int32
    (words,), and scales.
    """
    device = target.device
    if not dispatch.on_gpu(target):  # elsewhere than on a GPU there are only the CPU's loops
        target, rows, widths = target.cpu(), rows.cpu(), widths.cpu()
        coefficients = None if coefficients is None else coefficients.cpu()
    coder = _ColumnCoder(rows, length)
    stream = np.zeros(words, np.uint32)
    begins, sizes = offsets(widths, len(rows), length).tolist(), widths.tolist()
    columns = torch.zeros(target.shape[1], dtype=torch.float16, device=target.device)
    errors = target.new_zeros(target.shape[::-1])
    for start in range(0, target.shape[1], _PANEL):
        panel = slice(start, min(start + _PANEL, target.shape[1]))
        goal = target[:, panel].T.contiguous()  # (width of the panel, out)
        x = goal if coefficients is None else torch.addmm(goal, coefficients[:start, panel].T, errors[:start])
        states = torch.zeros(x.shape, dtype=torch.int16, device=x.device)
        for j, at in enumerate(range(panel.start, panel.stop)):
            coded = goal.new_zeros(goal.shape[1])
            if sizes[at]:
                states[j], columns[at], coded = coder(x[j], sizes[at])
            errors[at] = goal[j] - coded
            if coefficients is not None:
                x[j + 1 :] += coefficients[at, at + 1 : panel.stop].unsqueeze(1) * errors[at]
        for at, path in zip(range(panel.start, panel.stop), states.cpu().numpy(), strict=True):
            if sizes[at]:
                viterbi.write_stream(path, sizes[at], length, stream, begins[at])
    codes = torch.from_numpy(stream.view(np.int32)).to(device)
    return codes, TrellisScales(rows.to(device), columns=columns.to(device), widths=widths.to(device))


Searcher = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]  # see `viterbi.Search`


def _compiled(steps: int, length: int) -> Searcher:
    search = viterbi.Search(steps, length)
    return lambda x, weights, table, width: torch.from_numpy(search(x.numpy(), weights.numpy(), table.numpy(), width))


def _search_on(device: torch.device, steps: int, length: int) -> Searcher:
    from loftq.core.kernels import gpu_viterbi

    return gpu_viterbi.Search(steps, length, device)


class _ColumnCoder:
    """Codes one column after the other. Errors count as they are in the weight, not relative to rows."""

    def __init__(self, rows: torch.Tensor, length: int) -> None:
        self._rows, self._tables = rows, tables_on(rows.device, length)
        self._inverse = torch.where(rows > 0, 1 / rows, 0.0)
        weights = rows.square()
        self._weights = weights / weights.mean().clamp(min=_TINY)
        steps = len(rows)
        self._search = _search_on(rows.device, steps, length) if dispatch.on_gpu(rows) else _compiled(steps, length)

    def __call__(self, x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Code `x` (out,) with a width above 0: the states, the scale in float16, and the coded values (out,)."""
        unit = x * self._inverse
        spread = unit.square().mean().sqrt().clamp(min=_TINY)
        levels = self._tables[width - 1]
        states = self._search(unit / spread, self._weights, levels, width)
        values = self._rows * levels[states.long()]
        energy = values.double().square().sum()
        best = torch.where(energy > 0, values.double() @ x.double() / energy, 0.0)  # the least squares fit
        scale = best.float().clamp(-_LARGEST, _LARGEST).half()
        return states, scale, values * scale.float()
