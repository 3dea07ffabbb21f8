"""`loftq merge --to bf16`: a dense model."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from loftq.formats.artifact import DENSE
from loftq.formats.checkpoint import Checkpoint, TensorSpec
from loftq.formats.model_config import with_old_names
from loftq.formats.shard_writer import ShardWriter
from loftq.merging.checkpoint_names import CheckpointNames, at_expert, is_whole
from loftq.merging.model_folder import ModelFolder
from loftq.models.tasks import build_meta


class Dense(ModelFolder):
    """A dense model in 16 bits: backbone plus adapter, for every kind of adapter."""

    name = "bf16"
    format = DENSE
    any_backbone = True
    comparable = True
    tolerance = 5e-4  # the same weights, rounded to the same 16 bits
    rounds = True

    def check(self) -> None:
        """Return None: every pair can be merged into a dense model, and nothing is lost."""

    @cached_property
    def _names(self) -> CheckpointNames:
        model, _ = build_meta(self.pair.backbone.folder, task=self.pair.backbone.task)
        return CheckpointNames(model, mixture=bool(self.pair.backbone.stacks))

    def name_of(self, name: str) -> str:
        """The name of a tensor in checkpoints of the model."""
        return self._names.of(name)

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensor of one linear, or the tensors of fused experts."""
        *experts, rows, columns = self.pair.backbone.shapes[module]
        if not experts:
            shape = (columns, rows) if module in self._names.transposed else (rows, columns)
            return [TensorSpec(self.name_of(f"{module}.weight"), torch.bfloat16, shape)]
        first = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
        tensors = self._names.of_expert(module, first)
        if is_whole(tensors):
            name, tensor = next(iter(tensors.items()))
            return [TensorSpec(name, torch.bfloat16, (*experts, *tensor.shape[1:]))]
        return [
            TensorSpec(at_expert(name, expert), torch.bfloat16, tuple(tensor.shape))
            for expert in range(*experts)
            for name, tensor in tensors.items()
        ]

    def write_module(self, module: str, writer: ShardWriter) -> dict[str, str]:
        """Write the tensors of one linear, or of fused experts, one expert at a time."""
        if module not in self.pair.backbone.stacks:
            return super().write_module(module, writer)
        specs, hashes = self.specs(module), {}
        stream = writer.piecewise(specs[0].name) if len(specs[0].shape) == 3 else None
        for expert, weight in enumerate(self.pair.merged_experts(module)):
            for name, tensor in self._names.of_expert(module, weight.bfloat16(), expert).items():
                if stream is not None:
                    stream.add(tensor[0])
                else:
                    hashes[name] = writer.write(name, tensor.contiguous())
        return hashes if stream is None else {specs[0].name: stream.finish()}

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        weight = self.pair.merged(module).bfloat16()
        return {self.name_of(f"{module}.weight"): weight.t() if module in self._names.transposed else weight}

    def rounded(self, _module: str, _written: Checkpoint, weight: torch.Tensor) -> torch.Tensor:
        """The sum in 16 bits."""
        return weight.bfloat16().float()

    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        own = {key: value for key, value in self.pair.config.items() if key != "quantization_config"}
        config = with_old_names(own)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
        return config
