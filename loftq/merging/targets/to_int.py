"""`loftq merge --to int`: the adapter is merged exactly into the zero-points."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from loftq.core.grid import Grid
from loftq.core.scales import Scales
from loftq.formats import native
from loftq.formats.checkpoint import TensorSpec
from loftq.merging.model_folder import ModelFolder
from loftq.models.linears import find_linears, skip_modules
from loftq.models.tasks import build_meta


class Integers(ModelFolder):
    """A folder in our own layout, with exactly the codes and scales of the backbone."""

    name = "int"
    format = native.METHOD
    comparable = True
    tolerance = 3e-4

    def check(self) -> None:
        """Raise OptionError unless the adapter folds into the zero-points."""
        self.pair.require_pools()

    def grid(self, module: str) -> Grid:
        """The type of the backbone, with floating zero-points."""
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
        """The contents of `config.json`."""
        backbone = self.pair.backbone
        model, _ = build_meta(backbone.folder, task=backbone.task)
        skipped = skip_modules(model, find_linears(model), backbone.grids)
        codebooks = {module: grid.codebook for module, grid in backbone.grids.items()}
        grid = self.grid(next(iter(codebooks)))
        entry = native.quantization_config(grid, backbone.dtype, skipped, codebooks)
        return {**self.pair.config, "quantization_config": entry}
