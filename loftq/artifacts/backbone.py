"""A quantized backbone on disk, whose linears are read one at a time: a loftq folder or a GPTQ checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from loftq.artifacts.quantized_linears import listed_linears
from loftq.core.affine import AffineWeight, scatter
from loftq.core.grid import Grid
from loftq.core.scales import Solved
from loftq.errors import ArtifactError, OptionError
from loftq.formats import gptq
from loftq.formats.artifact import MANIFEST, Artifact, open_artifact
from loftq.formats.checkpoint import Checkpoint, dtype_of, read_checkpoint
from loftq.formats.layouts import LAYOUTS
from loftq.formats.model_config import read_config
from loftq.models.tasks import recorded_task

CAUSAL_LM = "causal-lm"


@dataclass(frozen=True)
class Backbone:
    """Quantized linears by module name, with their types and shapes (out, in), and the checkpoint that holds them.

    Among them are fused experts, by the name of the parameter, with shapes (experts, out, in). Their weights are read
    one expert at a time.

    `artifact` is None for a folder that loftq did not write. `read_linear` reads a linear if the layout's own reader,
    which reads files that loftq wrote, does not apply.
    """

    checkpoint: Checkpoint
    format: str
    grids: Mapping[str, Grid]
    shapes: Mapping[str, tuple[int, ...]]
    task: str
    artifact: Artifact | None = None
    read_linear: Callable[..., Solved] | None = None

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return self.checkpoint.folder

    @cached_property
    def config(self) -> dict[str, Any]:
        """The contents of its `config.json`."""
        return read_config(self.folder, ArtifactError)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it computes."""
        return dtype_of(self.config)

    @property
    def kinds(self) -> list[tuple[int, int]]:
        """The pairs of bits and group size that its linears have, each pair once."""
        pairs = ((grid.bits, grid.block(self.shapes[module][-1])) for module, grid in self.grids.items())
        return list(dict.fromkeys(pairs))

    @cached_property
    def owners(self) -> dict[str, str]:
        """The module of each tensor that is part of a quantized weight."""
        layout = LAYOUTS[self.format]
        return {
            spec.name: module
            for module, grid in self.grids.items()
            for spec in layout.specs(module, self.shapes[module], grid, self.dtype)
        }

    @cached_property
    def stacks(self) -> dict[str, int]:
        """The number of experts of each parameter of fused experts."""
        return {module: shape[0] for module, shape in self.shapes.items() if len(shape) == 3}

    def reader(self, expert: int | None = None) -> Callable[[str], torch.Tensor]:
        """The function that reads a tensor by its name, or its part that belongs to an expert."""
        return self.checkpoint.read if expert is None else partial(self.checkpoint.read_member, index=expert)

    def read(self, module: str, expert: int | None = None) -> Solved:
        """The codes of a module or an expert, in the form in which the solver returns them, and its scales."""
        read = self.read_linear or LAYOUTS[self.format].read
        return read(module, self.shapes[module], self.grids[module], self.reader(expert))

    def affine(self, module: str) -> AffineWeight:
        """The unpacked integers of a module, with scales and shifts."""
        return AffineWeight.of(*self.read(module), self.shapes[module], self.grids[module].bits)

    def dense(self, module: str, expert: int | None = None) -> torch.Tensor:
        """The dequantized weight of a module or an expert: float32 (out, in)."""
        shape, grid = torch.Size(self.shapes[module][-2:]), self.grids[module]
        groups = self._input_groups(module)
        if groups is not None:
            weight = self.affine(module)
            return scatter(weight.codes, weight.scales, weight.shifts, groups, grid.bits)
        return grid.decoder(shape[1]).decode(*self.read(module, expert), shape)

    def require_zero_points(self) -> None:
        """Raise OptionError unless a QA-LoRA adapter can be merged into the zero-points of all linears."""
        for module, grid in self.grids.items():
            if not grid.integer or grid.zero_point in (None, "symmetric"):
                raise OptionError(
                    f"{self.folder} has no zero-points to merge into ({module} is {grid}): requantize with "
                    "`loftq quantize --adapter qalora`, or merge with --to bf16"
                )
            if self._input_groups(module) is not None:
                raise OptionError(
                    f"{self.folder} is an act-order checkpoint: the inputs of a group of {module} are not consecutive, "
                    "so a pool of inputs does not consist of whole groups: merge with --to bf16, or requantize with "
                    "`loftq quantize --adapter qalora`"
                )

    def _input_groups(self, module: str) -> torch.Tensor | None:
        """The group of each input, if groups are not of consecutive inputs; None otherwise."""
        layout = LAYOUTS[self.format]
        return layout.input_groups(module, self.shapes[module], self.grids[module], self.checkpoint.read)


def open_backbone(folder: Path) -> Backbone:
    """Open a loftq folder or a GPTQ checkpoint. Raises ArtifactError."""
    if (folder / MANIFEST).is_file() or not gptq.is_gptq(folder):
        return backbone_of(open_artifact(folder))
    entry = read_config(folder, ArtifactError)["quantization_config"]
    checkpoint = read_checkpoint(folder)
    grid, less = gptq.read_config(entry, folder)
    shapes = gptq.shapes_of(checkpoint.tensors)
    grids = dict.fromkeys(shapes, grid)
    return Backbone(checkpoint, gptq.METHOD, grids, shapes, CAUSAL_LM, read_linear=partial(gptq.read, less=less))


def backbone_of(artifact: Artifact, checkpoint: Checkpoint | None = None) -> Backbone:
    """The quantized backbone of a loftq folder; only headers are read. Raises ArtifactError if it has none."""
    linears, manifest = listed_linears(artifact), artifact.manifest
    task = recorded_task(manifest, artifact.folder / MANIFEST).name
    checkpoint = checkpoint or read_checkpoint(artifact.folder)
    return Backbone(checkpoint, manifest["format"], linears.grids, linears.shapes, task, artifact)
