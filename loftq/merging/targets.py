"""What a backbone and its adapter are merged into: for each target, the tensors of a linear and the configuration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from loftq.artifacts.pair import BackboneAndAdapter
from loftq.core.affine import shifts_of
from loftq.core.grid import Grid
from loftq.core.scales import Scales
from loftq.errors import OptionError
from loftq.formats import gptq, mlx, native
from loftq.formats.checkpoint import TensorSpec
from loftq.formats.layouts import misfit
from loftq.models.linears import find_linears, skip_modules
from loftq.models.tasks import build_meta


class Target(Protocol):
    """What a linear becomes."""

    @property
    def format(self) -> str:
        """Of what is written: a name of LAYOUTS, or "dense"."""

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one linear."""

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""

    def config(self) -> dict[str, Any]:
        """`config.json`."""

    def grid(self, module: str) -> Grid | None:
        """The type of what is written; None for what is not quantized."""


@dataclass(frozen=True)
class Dense:
    """16 bits: backbone plus adapter, whatever they are."""

    pair: BackboneAndAdapter
    format: str = "dense"

    @cached_property
    def _transposed(self) -> set[str]:
        found = find_linears(build_meta(self.pair.backbone.folder, task=self.pair.backbone.task)[0]).candidates
        return {name for name, dense in found.items() if dense.transposed}

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one linear."""
        rows, columns = self.pair.backbone.shapes[module]
        shape = (columns, rows) if module in self._transposed else (rows, columns)
        return [TensorSpec(f"{module}.weight", torch.bfloat16, shape)]

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        weight, added = self.pair.backbone.dense(module), self.pair.delta(module)
        if added is not None:
            weight += added
        weight = weight.bfloat16()
        return {f"{module}.weight": weight.t() if module in self._transposed else weight}

    def config(self) -> dict[str, Any]:
        """`config.json`."""
        config = {key: value for key, value in self.pair.backbone.config.items() if key != "quantization_config"}
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
        return config

    def grid(self, _module: str) -> None:
        """None: nothing is quantized."""


@dataclass(frozen=True)
class Integers:
    """The adapter in the zero-points: our format, with the codes and scales of the backbone, bit for bit."""

    pair: BackboneAndAdapter
    format: str = "loftq"

    def grid(self, module: str) -> Grid:
        """The backbone's, with zero-points anywhere."""
        return replace(self.pair.backbone.grids[module], zero_point="float32")

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one linear."""
        backbone = self.pair.backbone
        return native.specs(module, backbone.shapes[module], self.grid(module), backbone.dtype)

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        backbone = self.pair.backbone
        codes, scales = backbone.read(module)
        merged = Scales(scales.values, scales.nested, self.pair.shifts(module, scales))
        return native.tensors(module, backbone.shapes[module], self.grid(module), backbone.dtype, codes, merged)

    def config(self) -> dict[str, Any]:
        """`config.json`."""
        backbone = self.pair.backbone
        model, _ = build_meta(backbone.folder, task=backbone.task)
        skipped = skip_modules(model, find_linears(model), backbone.grids)
        codebooks = {module: grid.codebook for module, grid in backbone.grids.items()}
        grid = self.grid(next(iter(codebooks)))
        entry = native.quantization_config(grid, backbone.dtype, skipped, codebooks)
        return {**backbone.config, "quantization_config": entry}


@dataclass(frozen=True)
class Mlx:
    """The adapter in the biases of MLX's affine layout."""

    pair: BackboneAndAdapter
    format: str = "mlx"

    def check(self) -> None:
        """Raise OptionError where MLX cannot hold the backbone."""
        for bits, block in self.pair.backbone.kinds:
            mlx.check(bits, block)

    def grid(self, _module: str) -> None:
        """None: nothing is quantized in a format that loftq reads."""

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one linear."""
        grid, shape = self.pair.backbone.grids[module], self.pair.backbone.shapes[module]
        return mlx.specs(module, shape, grid.bits, grid.block(shape[1]))

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        return mlx.tensors(module, self.pair.affine(module))

    def config(self) -> dict[str, Any]:
        """`config.json`."""
        grids = self.pair.backbone.grids
        widths = {module: grid.bits for module, grid in grids.items()}
        bits = Counter(widths.values()).most_common(1)[0][0]
        others = {module: width for module, width in widths.items() if width != bits}
        return mlx.config(self.pair.backbone.config, bits, next(iter(grids.values())).block_size, others)


@dataclass(frozen=True)
class Rounded:
    """GPTQ: zero-points rounded to whole numbers, and most of the adapter with them."""

    pair: BackboneAndAdapter
    format: str = "gptq"

    def grid(self, module: str) -> Grid:
        """The backbone's, with whole zero-points."""
        return replace(self.pair.backbone.grids[module], zero_point="integer")

    def check(self) -> None:
        """Raise OptionError where GPTQ cannot hold the backbone."""
        backbone = self.pair.backbone
        if len(set(backbone.grids.values())) > 1:
            raise OptionError(f"--to gptq: {backbone.folder} has several widths, GPTQ one a folder: use --to int")
        for module, (rows, columns) in backbone.shapes.items():
            grid = self.grid(module)
            problem = "its scales are doubly quantized" if grid.double_quant else misfit("gptq", grid, rows, columns)
            if problem is not None:
                raise OptionError(
                    f"--to gptq: {module} ({rows} x {columns}): {problem.partition(': use')[0]}: use --to int"
                )

    def zeros(self, module: str, scales: Scales, wanted: torch.Tensor) -> torch.Tensor:
        """Whole zero-points, the nearest to wanted shifts: uint8 (groups,)."""
        half = 2 ** (self.grid(module).bits - 1)
        steps = torch.where(scales.values > 0, wanted / scales.values, 0)
        zeros: torch.Tensor = (half - steps).round_().clamp_(0, 2 * half - 1)
        return zeros.to(torch.uint8)

    def measure(self) -> float:
        """The share of the adapter that whole zero-points lose, over all linears: of Frobenius norms.

        Infinite where the adapter adds nothing and rounding alone moves the weights.
        """
        lost = whole = 0.0
        for module, grid in self.pair.backbone.grids.items():
            _, scales = self.pair.backbone.read(module)
            wanted = self.pair.shifts(module, scales)
            found = shifts_of(self.zeros(module, scales, wanted), scales.values, grid.bits)
            block = grid.block(self.pair.backbone.shapes[module][1])
            lost += block * _squared(found - wanted)
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
        """`config.json`."""
        backbone = self.pair.backbone
        codebooks: Mapping[str, str] = {module: grid.codebook for module, grid in backbone.grids.items()}
        grid = self.grid(next(iter(codebooks)))
        entry = gptq.quantization_config(grid, backbone.dtype, (), codebooks, list(codebooks))
        return {**backbone.config, "quantization_config": entry}


def _squared(values: torch.Tensor) -> float:
    return float(values.double().square().sum())
