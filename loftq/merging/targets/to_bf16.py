"""`loftq merge --to bf16`: a dense model."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from loftq.formats.checkpoint import Checkpoint, TensorSpec
from loftq.formats.shard_writer import ShardWriter
from loftq.merging.model_folder import ModelFolder
from loftq.models.expert_stacks import find_stacks
from loftq.models.linears import find_linears
from loftq.models.tasks import build_meta


class Dense(ModelFolder):
    """A dense model in 16 bits: backbone plus adapter, for every kind of adapter."""

    name = "bf16"
    format = "dense"
    any_backbone = True
    comparable = True
    tolerance = 5e-4  # the same weights, rounded to the same 16 bits
    rounds = True

    def check(self) -> None:
        """Return None: every pair can be merged into a dense model, and nothing is lost."""

    @cached_property
    def _transposed(self) -> set[str]:
        model, _ = build_meta(self.pair.backbone.folder, task=self.pair.backbone.task)
        linears = {name for name, linear in find_linears(model).candidates.items() if linear.transposed}
        return linears | {name for name, stack in find_stacks(model).candidates.items() if stack.transposed}

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensor of one linear, or of fused experts."""
        *experts, rows, columns = self.pair.backbone.shapes[module]
        shape = (columns, rows) if module in self._transposed else (rows, columns)
        return [TensorSpec(module if experts else f"{module}.weight", torch.bfloat16, (*experts, *shape))]

    def write_module(self, module: str, writer: ShardWriter) -> dict[str, str]:
        """Write the tensor of one linear, or of fused experts, one expert at a time."""
        if module not in self.pair.backbone.stacks:
            return super().write_module(module, writer)
        stream = writer.piecewise(module)
        for weight in self.pair.merged_experts(module):
            stream.add((weight.t() if module in self._transposed else weight).bfloat16())
        return {module: stream.finish()}

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        weight = self.pair.merged(module).bfloat16()
        return {f"{module}.weight": weight.t() if module in self._transposed else weight}

    def rounded(self, _module: str, _written: Checkpoint, weight: torch.Tensor) -> torch.Tensor:
        """The sum in 16 bits."""
        return weight.bfloat16().float()

    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        config = {key: value for key, value in self.pair.config.items() if key != "quantization_config"}
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
        return config
