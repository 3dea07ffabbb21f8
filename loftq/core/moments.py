"""Second moments of a linear's inputs: the statistics of the data that calibrated quantization uses.

For y = W x with W (out, in), and x over n calibration tokens, the output error of a layer depends on the data only
through

    H = 1/n · Σ x xᵀ        (in, in),

since E‖(W − Q) x‖² = tr((W − Q) H (W − Q)ᵀ) (arXiv 2410.06040, eq. 9; GPTQ's Hessian, arXiv 2210.17323, is 2 n H).
Products are float32, their sum over batches is float64.

H is symmetric, so each panel of rows is computed and stored only from the block on its diagonal to the right, and on a
CPU only the upper half of this block is computed: this takes half of the work and little more than half of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from scipy.linalg.blas import ssyrk

from loftq.core.kernels import products

PANEL = 512  # rows that are computed at a time: with fewer rows, matrix products get slower
WHOLE = 2048  # entries up to which all panels are computed by one product
STRIP = 192  # rows of a panel that one of the fast products computes
ROWS = 4096  # vectors whose products are summed in float32 before they are added to a sum in float64


def panel_groups(size: int) -> list[range]:
    """The panels of a moment of `size` entries, in groups that are computed together."""
    count = -(-size // PANEL)
    return [range(count)] if size <= WHOLE else [range(index, index + 1) for index in range(count)]


def panel_shapes(size: int) -> list[tuple[int, int]]:
    """The shapes (rows, size − first row) of the panels of a moment of `size` entries."""
    return [(min(PANEL, size - start), size - start) for start in range(0, size, PANEL)]


def zero_panel(size: int, index: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A panel (rows, size − first row) of an empty sum, float64."""
    return torch.zeros(panel_shapes(size)[index], dtype=torch.float64, device=device)


def panel_products(x: torch.Tensor, group: range) -> list[torch.Tensor]:
    """What vectors x (n, size), float32, add to each panel of a group. Below the diagonal it has no meaning."""
    if products.are_fast() and x.device.type == "cpu":
        return [_by_strips(x, index * PANEL) for index in group]
    if x.shape[1] <= WHOLE:
        whole = _upper_half(x)
        return [whole[start : start + PANEL, start:] for start in range(0, x.shape[1], PANEL)]
    start = group.start * PANEL
    own, others = x[:, start : start + PANEL], x[:, start + PANEL :]
    return [torch.cat([_upper_half(own), own.t() @ others], 1)]


def _by_strips(x: torch.Tensor, start: int) -> torch.Tensor:
    """The panel that begins at a row, by strips so narrow that few entries below the diagonal are computed."""
    panel = torch.zeros(min(PANEL, x.shape[1] - start), x.shape[1] - start)
    for first in range(0, len(panel), STRIP):
        strip = slice(start + first, start + min(first + STRIP, len(panel)))
        panel[first : first + STRIP, first:] = x[:, strip].t() @ x[:, strip.start :]
    return panel


class Moment:
    """A running sum of x xᵀ over `count` vectors of `size` entries, in panels (rows, size − first row), float64.

    What lies below the diagonal has no meaning until `mean`.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.count = 0
        self.panels = [zero_panel(size, index, device) for group in panel_groups(size) for index in group]

    def add(self, inputs: torch.Tensor) -> None:
        """Add vectors (..., size) of any floating dtype."""
        x = inputs.reshape(-1, self.size).float()  # (n, in)
        for group in panel_groups(self.size):
            for index, product in zip(group, panel_products(x, group), strict=True):
                self.panels[index] += product
        self.count += len(x)

    def merge(self, other: Moment) -> Self:
        """Add the sum of another moment."""
        for panel, more in zip(self.panels, other.panels, strict=True):
            panel += more
        self.count += other.count
        return self

    def merge_mean(self, panels: Sequence[torch.Tensor], count: int) -> Self:
        """Add the sum over `count` vectors whose mean is given, by panels."""
        for panel, mean in zip(self.panels, panels, strict=True):
            panel.add_(mean.to(panel.device), alpha=count)
        self.count += count
        return self

    def mean(self) -> list[torch.Tensor]:
        """The panels of H, float32 on the CPU."""
        means = [(panel / self.count).float().cpu() for panel in self.panels]
        for mean in means:
            block = mean[:, : len(mean)]
            block.copy_(block.triu() + block.triu(1).t())
        return means


def _upper_half(x: torch.Tensor) -> torch.Tensor:
    """The sum of x xᵀ (in, in) over vectors (n, in), float32; on a CPU, values below the diagonal are zero."""
    if x.device.type != "cpu" or not len(x):
        return x.t() @ x
    return torch.from_numpy(ssyrk(1.0, x.detach().numpy().T))


def weighted_moment(vectors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mean of x xᵀ (in, in) in float64 over vectors (n, in), each of which counts by its weight (n,)."""
    total = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64, device=vectors.device)
    roots = weights.sqrt().unsqueeze(1)
    for x, root in zip(torch.split(vectors, ROWS), torch.split(roots, ROWS), strict=True):
        scaled = x.float() * root
        total += scaled.t() @ scaled
    return total / weights.double().sum()


def assemble(panels: Sequence[torch.Tensor]) -> torch.Tensor:
    """H (in, in) from its panels."""
    whole = torch.empty(panels[0].shape[1], panels[0].shape[1], dtype=panels[0].dtype)
    start = 0
    for panel in panels:
        rows = len(panel)
        whole[start : start + rows, start:] = panel
        whole[start + rows :, start : start + rows] = panel[:, rows:].t()
        start += rows
    return whole
