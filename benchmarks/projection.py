"""Squared output error of projected rounding, as a part of that of intrinsic rounding, layer by layer.

    python benchmarks/projection.py --data FILE [MODEL] [--blocks 0 14 28] [--starts nf4:16 nf4:64 nf3:64 nf2:64 ...]
                                    [--tokens 16384]

Both solve the same weights with three turns, for the same tokens of FILE's first half. Prints, for each type and rank,
the geometric mean over the linears of the blocks, the least and the largest ratio, how many are above 1, and the part
of the weights' energy along the adapter's directions, which a projected backbone lacks.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from calibrated import LENGTH
from machine import describe, table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from tried import linears

from loftq.core.directions import leading_directions, without_directions
from loftq.core.grid import Grid
from loftq.core.metric import damped
from loftq.core.solvers.calibrated import solve_calibrated
from loftq.core.solvers.methods import METHODS
from loftq.hub.source import find_source


@torch.no_grad()
def moments(model: Any, layers: dict[str, nn.Linear], windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The second moment of each linear's inputs."""
    sums: dict[str, torch.Tensor] = {}

    def see(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            x = inputs[0].flatten(0, 1)
            sums[name] = sums.get(name, torch.zeros(())) + (x.T @ x).double()

        return hook

    handles = [module.register_forward_pre_hook(see(name)) for name, module in layers.items()]
    for part in windows.split(4):
        model.model(input_ids=part)
    for handle in handles:
        handle.remove()
    return {name: (total / windows.numel()).float() for name, total in sums.items()}


def ratio(weight: torch.Tensor, moment: torch.Tensor, kind: str, rank: int) -> tuple[float, float]:
    """The ratio of the squared errors, and the part of the weight's energy along the directions."""
    grid = Grid(kind, 64, zero_point="integer" if kind.startswith("int") else None)
    quantizer, errors = grid.quantizer(weight.shape[1]), []
    for rounding in ("projected", "intrinsic"):
        method = replace(METHODS["calibrated"], rounding=rounding)
        outputs = solve_calibrated(weight, quantizer, method, moment, rank, 3, 1.0).trace.outputs
        errors.append(outputs.final**2 if outputs else math.nan)
    directions = leading_directions(damped(moment), rank, torch.Generator().manual_seed(0))
    left = without_directions(weight, directions).square().sum() / weight.square().sum()
    return errors[0] / errors[1], 1 - float(left)


def main() -> None:
    """Solve and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 14, 28])
    parser.add_argument("--starts", nargs="+", default=["nf4:16", "nf4:64", "nf3:16", "nf3:64", "nf2:16", "nf2:64"])
    parser.add_argument("--tokens", type=int, default=16384)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = find_source(options.model)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    text = options.data.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(source.folder)(text[: len(text) // 2], return_tensors="pt").input_ids[0]
    order = torch.randperm(len(ids) // LENGTH, generator=torch.Generator().manual_seed(0))
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[order[: options.tokens // LENGTH]]
    layers = {name: each for name, each in linears(model).items() if int(name.split(".")[1]) in options.blocks}
    known = moments(model, layers, windows)
    rows: list[tuple[str, ...]] = [("start", "mean", "least", "largest", "above 1", "energy left out")]
    for start in options.starts:
        kind, _, rank = start.partition(":")
        found = [ratio(each.weight.data.clone(), known[name], kind, int(rank)) for name, each in layers.items()]
        ratios = [each for each, _ in found]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        above = f"{sum(each > 1 for each in ratios)} of {len(ratios)}"
        energy = f"{sum(part for _, part in found) / len(found):.1%}"
        rows.append(
            (f"{kind.upper()}, rank {rank}", f"{mean:.3f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}", above, energy)
        )
        print(*rows[-1], sep="  ", flush=True)
    print(f"\n{source.name}, {options.tokens} tokens, blocks {options.blocks}\n{describe()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
