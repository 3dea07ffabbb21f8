"""Rounding that knows its inputs: ours against GPTQ written plainly in torch.

    python benchmarks/rounding.py [--shapes 4096x4096 4096x11008] [--runs 3] [--device cuda]

Prints, for NF4 and INT4 at each shape, the time of error feedback in both, their ratio, the rates in weights a second
of feedback and of a round of descent, and the output error of each beside plain rounding's; then the search for scales.
The plain version is the published loop: columns in blocks of 128, the Cholesky factor of the inverse of H, the grid
frozen.
"""

from __future__ import annotations

import argparse

import torch
from machine import SEED, describe, once, seconds, table

from loftq.core.grid import Grid, Quantizer
from loftq.core.rounding import descend, feedback, output_squared_norm
from loftq.core.scale_search import search
from loftq.core.scales import Scales

_BLOCK = 128  # columns


def plain_gptq(weight: torch.Tensor, quantizer: Quantizer, scales: Scales, moment: torch.Tensor) -> torch.Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1) with the levels and scales of a quantizer: the rounded weight."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    levels = quantizer.levels.to(weight.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    grid = scales.values.view(len(weight), -1)  # (out, blocks)
    work, rounded = weight.clone(), torch.empty_like(weight)
    for start in range(0, work.shape[1], _BLOCK):
        end = min(start + _BLOCK, work.shape[1])
        errors = work.new_empty(len(work), end - start)
        for j in range(start, end):
            scale = grid[:, j // quantizer.block_size]
            rounded[:, j] = levels[torch.bucketize(work[:, j] / scale, midpoints)] * scale
            error = (work[:, j] - rounded[:, j]) / factor[j, j]
            work[:, j:end] -= error.unsqueeze(1) * factor[j, j:end]
            errors[:, j - start] = error
        work[:, end:] -= errors @ factor[start:end, end:]
    return rounded


def compare(shapes: list[tuple[int, int]], runs: int, device: str) -> list[tuple[str, ...]]:
    """A row for each shape and type. Errors are tr(E H Eᵀ) relative to plain rounding's."""
    heading = ("layer", "type", "plain GPTQ", "feedback", "ratio", "feedback Mw/s", "descent Mw/s", "search Mw/s")
    rows: list[tuple[str, ...]] = [(*heading, "error plain GPTQ", "feedback", "+ descent")]
    for shape in shapes:
        generator = torch.Generator().manual_seed(SEED)
        weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        inputs = torch.randn(2 * shape[1], shape[1], generator=generator) * torch.logspace(0, -1, shape[1])
        inputs += inputs.roll(1, dims=1) + inputs.mean(dim=1, keepdim=True)
        moment = (inputs.T @ inputs / len(inputs)).double()
        moment.diagonal().add_(0.01 * moment.diagonal().mean())
        weight, moment = weight.to(device), moment.to(device)
        for name in ("nf4", "int4"):
            quantizer = Grid(name).quantizer(shape[1])
            codes, scales = quantizer.quantize(weight)
            found: list[torch.Tensor] = []
            slow = once(lambda: found.append(plain_gptq(weight, quantizer, scales, moment)))  # noqa: B023
            fast = seconds(lambda: feedback(weight, quantizer, scales, moment), runs)  # noqa: B023
            fed = feedback(weight, quantizer, scales, moment)
            descent = seconds(lambda: descend(weight, quantizer, scales, fed, moment), runs)  # noqa: B023
            searched = seconds(lambda: search(weight, quantizer), runs)  # noqa: B023
            down = descend(weight, quantizer, scales, fed, moment)
            rounded = [quantizer.decode(each, scales, weight.shape) for each in (codes, fed, down)]
            before, *after = (
                output_squared_norm(weight - each, moment) for each in (rounded[0], found[0], *rounded[1:])
            )
            rates = [f"{weight.numel() / each / 1e6:.1f}" for each in (fast, descent, searched)]
            times = [f"{slow:.2f} s", f"{fast:.3f} s", f"{slow / fast:.1f}x"]
            rows.append((f"{shape[0]} x {shape[1]}", name, *times, *rates, *(f"{each / before:.4f}" for each in after)))
    return rows


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "1024x2752"], help="outputs x inputs of layers")
    parser.add_argument("--runs", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    shapes = [tuple(map(int, each.split("x"))) for each in given.shapes]
    print(describe(given.device), end="\n\n")
    print(table(compare([(rows, columns) for rows, columns in shapes], given.runs, given.device)))


if __name__ == "__main__":
    main()
