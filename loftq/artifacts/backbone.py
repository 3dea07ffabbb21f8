"""A quantized backbone on disk, ours or somebody else's GPTQ checkpoint: its linears one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from loftq.core.affine import AffineWeight
from loftq.core.codebooks import INTEGERS
from loftq.core.grid import Grid
from loftq.core.scales import Solved
from loftq.errors import ArtifactError, OptionError
from loftq.formats import gptq
from loftq.formats.artifact import MANIFEST, Artifact, open_artifact
from loftq.formats.checkpoint import Checkpoint, dtype_of, read_checkpoint
from loftq.formats.layouts import LAYOUTS

CAUSAL_LM = "causal-lm"


@dataclass(frozen=True)
class Backbone:
    """Quantized linears by module name, with their types and shapes (out, in), and the checkpoint they lie in.

    `artifact` is None for a folder that loftq did not write. `less` is 1 where GPTQ's version 1 wrote it.
    """

    checkpoint: Checkpoint
    format: str
    grids: Mapping[str, Grid]
    shapes: Mapping[str, tuple[int, int]]
    task: str
    artifact: Artifact | None = None
    less: int = 0

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.checkpoint.folder

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its `config.json`."""
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return dtype_of(self.config)

    @property
    def kinds(self) -> list[tuple[int, int]]:
        """The widths and group sizes that its linears have, each pair once."""
        found = ((grid.bits, grid.block(self.shapes[module][1])) for module, grid in self.grids.items())
        return list(dict.fromkeys(found))

    @cached_property
    def owners(self) -> dict[str, str]:
        """The module of each tensor that is a part of a quantized weight."""
        layout = LAYOUTS[self.format]
        return {
            spec.name: module
            for module, grid in self.grids.items()
            for spec in layout.specs(module, self.shapes[module], grid, self.dtype)
        }

    def read(self, module: str) -> Solved:
        """A module's codes, as the solver leaves them, and scales."""
        layout = LAYOUTS[self.format]
        read = partial(gptq.read, less=self.less) if self.format == "gptq" else layout.read
        return read(module, self.shapes[module], self.grids[module], self.checkpoint.read)

    def affine(self, module: str) -> AffineWeight:
        """A module's integers, unpacked."""
        return AffineWeight.of(*self.read(module), self.shapes[module], self.grids[module].bits)

    def dense(self, module: str) -> torch.Tensor:
        """What a module's codes stand for: float32 (out, in)."""
        shape, grid = torch.Size(self.shapes[module]), self.grids[module]
        if not self._ordered(module):
            weight, g_idx = self.affine(module), self.checkpoint.read(f"{module}.g_idx")
            return gptq.scatter(weight.codes, weight.scales, weight.shifts, g_idx, grid.bits)
        return grid.quantizer(shape[1]).decode(*self.read(module), shape)

    def require_zero_points(self) -> None:
        """Raise OptionError unless adapters on pooled inputs fold into the zero-points of all linears."""
        for module, grid in self.grids.items():
            if grid.codebook not in INTEGERS or grid.zero_point in (None, "symmetric"):
                raise OptionError(
                    f"{self.folder} has no zero-points to merge into ({module} is {grid}): requantize with "
                    "`loftq quantize --adapter qalora`, or merge with --to bf16"
                )
            if not self._ordered(module):
                raise OptionError(
                    f"{self.folder} is an act-order checkpoint: the groups of {module} are not of consecutive "
                    "inputs, so that no pool is made of whole groups: merge with --to bf16, or requantize with "
                    "`loftq quantize --adapter qalora`"
                )

    def _ordered(self, module: str) -> bool:
        """Whether groups are of consecutive inputs."""
        if self.format != "gptq":
            return True
        block = self.grids[module].block(self.shapes[module][1])
        return gptq.is_ordered(self.checkpoint.read(f"{module}.g_idx"), block)


def open_backbone(folder: Path) -> Backbone:
    """Open a folder of ours, or a GPTQ checkpoint. Raises ArtifactError."""
    if (folder / MANIFEST).is_file() or not gptq.is_gptq(folder):
        return backbone_of(open_artifact(folder))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    checkpoint = read_checkpoint(folder)
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in gptq.READABLE:
        raise ArtifactError(f"{folder}: GPTQ's format {version!r} cannot be read (known: {', '.join(gptq.READABLE)})")
    zero_point = "symmetric" if config.get("sym", True) else "integer"
    grid = Grid(f"int{config['bits']}", config["group_size"], zero_point=zero_point)
    modules = [name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")]
    shapes = {
        module: (checkpoint.tensors[f"{module}.qweight"].shape[1], checkpoint.tensors[f"{module}.g_idx"].numel)
        for module in modules
    }
    grids = dict.fromkeys(modules, grid)
    return Backbone(checkpoint, "gptq", grids, shapes, CAUSAL_LM, less=gptq.READABLE[version])


def backbone_of(artifact: Artifact, checkpoint: Checkpoint | None = None) -> Backbone:
    """The quantized backbone of a folder of ours, from headers alone. Raises ArtifactError where it has none."""
    manifest = artifact.manifest
    recipe, rows = manifest["recipe"], manifest["layers"]
    if not rows or manifest.get("format") not in LAYOUTS:
        raise ArtifactError(f"{artifact.folder} is a {manifest['kind']} folder without a quantized backbone")
    shared = recipe["block_size"] if recipe["group_size"] is None else recipe["group_size"]
    grids = {row["name"]: Grid(row["codebook"], shared, recipe["double_quant"], recipe["zero_point"]) for row in rows}
    shapes = {row["name"]: (row["shape"][0], row["shape"][1]) for row in rows}
    task = manifest["source"].get("task", CAUSAL_LM)
    checkpoint = checkpoint or read_checkpoint(artifact.folder)
    return Backbone(checkpoint, manifest["format"], grids, shapes, task, artifact)
