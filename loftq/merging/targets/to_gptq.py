"""`loftq merge --to gptq`: zero-points are rounded to whole numbers, which loses most of the adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from loftq.core.affine import shifts_of
from loftq.core.grid import Grid
from loftq.core.scales import Scales
from loftq.errors import OptionError
from loftq.formats import gptq
from loftq.formats.checkpoint import TensorSpec
from loftq.formats.layouts import misfit
from loftq.merging.model_folder import ModelFolder
from loftq.merging.report import loss_text


class Rounded(ModelFolder):
    """A folder in GPTQ's layout, with the codes and scales of the backbone."""

    name = "gptq"
    format = gptq.METHOD
    uses = ("allow_rounding",)
    comparable = True

    def check(self) -> float:
        """Return the part of the adapter that is lost.

        Raises OptionError if GPTQ cannot hold the backbone, or if the loss is not allowed.
        """
        self.pair.require_pools()
        self._check_backbone()
        lost = self.measure()
        if not self.settings.allow_rounding:
            raise OptionError(
                f"--to gptq has whole zero-points, which cannot hold {self.pair.adapter.folder}: measured on it, this "
                f"would lose {loss_text(lost)}. Use --to int, which holds it exactly, or add --allow-rounding"
            )
        return lost

    def grid(self, module: str) -> Grid:
        """The type of the backbone, with whole zero-points."""
        return replace(self.pair.backbone.grids[module], zero_point="integer")

    def _check_backbone(self) -> None:
        backbone = self.pair.backbone
        if len(set(backbone.grids.values())) > 1:
            raise OptionError(
                f"--to gptq: {backbone.folder} has several widths, but a GPTQ folder has only one: use --to int"
            )
        for module, (rows, columns) in backbone.shapes.items():
            grid = self.grid(module)
            problem = (
                "its scales are doubly quantized" if grid.double_quant else misfit(gptq.METHOD, grid, rows, columns)
            )
            if problem is not None:
                raise OptionError(
                    f"--to gptq: {module} ({rows} x {columns}): {problem.partition(': use')[0]}: use --to int"
                )

    def zeros(self, module: str, scales: Scales, wanted: torch.Tensor) -> torch.Tensor:
        """The whole zero-points nearest to the exact shifts: uint8 (groups,)."""
        half = 2 ** (self.grid(module).bits - 1)
        steps = torch.where(scales.values > 0, wanted / scales.values, 0)
        zeros: torch.Tensor = (half - steps).round_().clamp_(0, 2 * half - 1)
        return zeros.to(torch.uint8)

    def measure(self) -> float:
        """The part of the adapter that whole zero-points lose, in Frobenius norms over all linears.

        It is infinite if the adapter adds nothing, because then only rounding moves the weights.
        """
        lost = whole = 0.0
        for module, grid in self.pair.backbone.grids.items():
            _, scales = self.pair.backbone.read(module)
            wanted = self.pair.shifts(module, scales)
            rounded = shifts_of(self.zeros(module, scales, wanted), scales.values, grid.bits)
            block = grid.block(self.pair.backbone.shapes[module][1])
            lost += block * _squared(rounded - wanted)
            whole += block * _squared(wanted - scales.offsets)
        return math.sqrt(lost / whole) if whole else math.inf if lost else 0.0

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one linear."""
        return gptq.specs(module, self.pair.backbone.shapes[module], self.grid(module), self.pair.backbone.dtype)

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        backbone = self.pair.backbone
        codes, scales = backbone.read(module)
        zeros = self.zeros(module, scales, self.pair.shifts(module, scales))
        rounded = Scales(scales.values, zeros=zeros)
        return gptq.tensors(module, backbone.shapes[module], self.grid(module), backbone.dtype, codes, rounded)

    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        backbone = self.pair.backbone
        codebooks: Mapping[str, str] = {module: grid.codebook for module, grid in backbone.grids.items()}
        grid = self.grid(next(iter(codebooks)))
        entry = gptq.quantization_config(grid, backbone.dtype, (), codebooks, list(codebooks))
        return {**self.pair.config, "quantization_config": entry}


def _squared(values: torch.Tensor) -> float:
    return float(values.double().square().sum())
