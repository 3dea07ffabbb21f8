"""`loftq merge --to gptq`: GPTQ's layout, in which a merge loses something.

A QA-LoRA goes into the zero-points of the backbone, which are rounded to whole numbers: most of the adapter is lost. A
plain LoRA and its backbone, of any type, are rounded anew to integers of 2, 3, 4 or 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch

from loftq.artifacts.pair import BackboneAndAdapter
from loftq.artifacts.staging import Staging
from loftq.core.affine import AffineQuantizer, shifts_of
from loftq.core.grid import Grid
from loftq.core.scales import Scales
from loftq.core.solvers.rounded import round_weight
from loftq.errors import OptionError, UnknownNameError
from loftq.formats import gptq
from loftq.formats.checkpoint import Checkpoint, TensorSpec, read_checkpoint
from loftq.formats.layouts import misfit
from loftq.merging.calibration import check_calibration
from loftq.merging.model_folder import ModelFolder
from loftq.merging.report import loss_text
from loftq.merging.rounded_weights import RoundedWeights
from loftq.merging.target import Target
from loftq.models.linears import find_linears
from loftq.models.tasks import build_meta
from loftq.settings import option_name


class Rounded(ModelFolder):
    """A folder in GPTQ's layout, with the codes and scales of the backbone, for a QA-LoRA."""

    name = "gptq"
    format = gptq.METHOD
    uses = ("allow_rounding", *RoundedWeights.uses)
    comparable = True

    @classmethod
    def of(cls, pair: BackboneAndAdapter) -> type[Target]:
        """The class for the kind of the adapter."""
        return cls if pair.adapter.pool_size is not None else RoundedAnew

    def check(self) -> float:
        """Return the part of the adapter that is lost.

        Raises OptionError if GPTQ cannot hold the backbone, or if the loss is not allowed.
        """
        self.pair.require_pools()
        for name in RoundedWeights.uses:
            value = getattr(self.settings, name)
            if value is not None:
                raise OptionError(
                    f"{option_name(name)} {value}: --to gptq rounds only the zero-points of a QA-LoRA: leave it out"
                )
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


class RoundedAnew(RoundedWeights):
    """A folder in GPTQ's layout, whose weights are backbone plus adapter, rounded anew."""

    name = "gptq"
    format = gptq.METHOD
    group_sizes = (64, 128, 32)

    def check(self) -> None:
        """Return None. Raises OptionError for settings that GPTQ lacks, and for weights that it cannot hold."""
        settings = self.settings
        if settings.allow_rounding:
            raise OptionError("--allow-rounding: applies to a QA-LoRA, and this is a plain LoRA: leave it out")
        if settings.bits not in (None, *gptq.BITS):
            raise OptionError(f"--bits {settings.bits}: --to gptq holds {', '.join(map(str, gptq.BITS))}")
        if settings.zero_point not in (None, "symmetric", "integer"):
            raise UnknownNameError("zero-point of --to gptq", str(settings.zero_point), ("symmetric", "integer"))
        check_calibration(settings)
        backbone = self.pair.backbone
        if backbone.stacks:
            first = next(iter(backbone.stacks))
            raise OptionError(f"--to gptq has no place for fused experts ({first}): use --to bf16")
        for module, (rows, columns) in backbone.shapes.items():
            problem = misfit(gptq.METHOD, self._grid, rows, columns)
            if problem is not None:
                reason = problem.partition(": use")[0]
                raise OptionError(f"--to gptq: {module} ({rows} x {columns}): {reason}: use --to bf16")
        transposed = [name for name, dense in find_linears(self._model).candidates.items() if dense.transposed]
        if transposed:
            raise OptionError(f"--to gptq holds only nn.Linear, and {transposed[0]} is a Conv1D: use --to bf16")

    def grid(self, module: str) -> Grid:  # noqa: ARG002
        """The type of all linears."""
        return self._grid

    @cached_property
    def _grid(self) -> Grid:
        """By default the narrowest type that is not narrower than any weight of the backbone."""
        widest = max(grid.bits for grid in self.pair.backbone.grids.values())
        bits = self.settings.bits or next(width for width in gptq.BITS if width >= widest)
        return Grid(f"int{bits}", self.group_size, zero_point=self.settings.zero_point or "integer")

    @cached_property
    def _model(self) -> Any:
        return build_meta(self.pair.backbone.folder, task=self.pair.backbone.task)[0]

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one linear."""
        return gptq.specs(module, self.pair.backbone.shapes[module], self._grid, self.pair.backbone.dtype)

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        weight = self.pair.merged(module).contiguous().to(self.device)
        quantizer = cast(AffineQuantizer, self._grid.quantizer(weight.shape[1], gptq.SCALE_DTYPE))
        moment = None if self.inputs is None else self.inputs.moment(module)
        codes, scales = round_weight(weight, quantizer, moment)
        return gptq.tensors(module, tuple(weight.shape), self._grid, self.pair.backbone.dtype, codes, scales)

    def rounded(self, module: str, written: Checkpoint, weight: torch.Tensor) -> torch.Tensor:
        """The sum, changed by the difference of the written weight from the sum that was rounded."""
        return weight + (self._stored(module, written) - self.pair.merged(module))

    def _stored(self, module: str, written: Checkpoint) -> torch.Tensor:
        shape = self.pair.backbone.shapes[module]
        quantizer = self._grid.quantizer(shape[1], gptq.SCALE_DTYPE)
        return quantizer.decode(*gptq.read(module, shape, self._grid, written.read), torch.Size(shape))

    def describe_loss(self, staging: Staging) -> dict[str, Any]:
        """What rounding moved, for the card: read again, because a resumed run has not rounded all of it."""
        written = read_checkpoint(staging.folder)
        lost = whole = 0.0
        for module in self.pair.backbone.grids:
            merged = self.pair.merged(module)
            lost += _squared(self._stored(module, written) - merged)
            whole += _squared(merged)
        return {"rounding_error": math.sqrt(lost / whole) if whole else 0.0, "rounded_to": str(self._grid)}

    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        names = list(self.pair.backbone.grids)
        codebooks = dict.fromkeys(names, self._grid.codebook)
        entry = gptq.quantization_config(self._grid, self.pair.backbone.dtype, (), codebooks, names)
        return {**self.pair.config, "quantization_config": entry}


def _squared(values: torch.Tensor) -> float:
    return float(values.double().square().sum())
