"""`loftq merge --to mlx`: the adapter is merged exactly into the biases of MLX's affine layout."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from loftq.formats import mlx
from loftq.formats.checkpoint import TensorSpec
from loftq.merging.model_folder import ModelFolder
from loftq.merging.readers import mlx_notes
from loftq.models.tasks import build_meta


class Mlx(ModelFolder):
    """A folder for mlx-lm. Its logits are not compared, because only mlx-lm can run it."""

    name = "mlx"
    format = "mlx"
    metadata = mlx.METADATA

    def check(self) -> None:
        """Return None. Raises OptionError if MLX cannot hold the backbone."""
        self.pair.require_pools()
        for bits, block in self.pair.backbone.kinds:
            mlx.check_linears(bits, block)

    def notes(self) -> tuple[str, ...]:
        """Notes for the user, also on settings of the model that the reader of the export does not read."""
        backbone = self.pair.backbone
        model, _ = build_meta(backbone.folder, task=backbone.task)
        return (*super().notes(), *mlx_notes(model, self.pair.config))

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one linear."""
        grid, shape = self.pair.backbone.grids[module], self.pair.backbone.shapes[module]
        return mlx.specs(module, shape, grid.bits, grid.block(shape[1]))

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        return mlx.tensors(module, self.pair.affine(module))

    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        grids = self.pair.backbone.grids
        widths = {module: grid.bits for module, grid in grids.items()}
        bits = Counter(widths.values()).most_common(1)[0][0]
        others = {module: width for module, width in widths.items() if width != bits}
        return mlx.config(self.pair.config, bits, next(iter(grids.values())).block_size, others)
