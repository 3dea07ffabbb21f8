"""`loftq merge --to bf16`: a dense model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from loftq.formats.artifact import DENSE
from loftq.formats.checkpoint import Checkpoint, TensorSpec
from loftq.formats.shard_writer import ShardWriter
from loftq.merging.model_folder import ModelFolder
from loftq.models.expert_stacks import find_stacks
from loftq.models.linears import find_linears
from loftq.models.naming import unfuse
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
    def _model(self) -> nn.Module:
        return build_meta(self.pair.backbone.folder, task=self.pair.backbone.task)[0]

    @cached_property
    def _transposed(self) -> set[str]:
        linears = {name for name, linear in find_linears(self._model).candidates.items() if linear.transposed}
        return linears | {name for name, stack in find_stacks(self._model).candidates.items() if stack.transposed}

    def name_of(self, name: str) -> str:
        """The name of a tensor in checkpoints of the model.

        That of a mixture may have other names than transformers' parameters: servers read only these.
        """
        return self._renamed.get(name, name)

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """The names in checkpoints of the parameters of a mixture that each become a single tensor."""
        state = self._model.state_dict() if self.pair.backbone.stacks else {}
        names = {key: list(unfuse(self._model, key, tensor)) for key, tensor in state.items()}
        return {key: found[0] for key, found in names.items() if len(found) == 1}

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensor of one linear, or the tensors of fused experts."""
        *experts, rows, columns = self.pair.backbone.shapes[module]
        shape = (columns, rows) if module in self._transposed else (rows, columns)
        if not experts:
            return [TensorSpec(self.name_of(f"{module}.weight"), torch.bfloat16, shape)]
        names = unfuse(self._model, module, torch.empty(1, *shape, dtype=torch.bfloat16, device="meta"))
        if _is_whole(names):
            return [TensorSpec(next(iter(names)), torch.bfloat16, (*experts, *shape))]
        return [
            TensorSpec(_of_expert(name, expert), torch.bfloat16, tuple(tensor.shape))
            for expert in range(*experts)
            for name, tensor in names.items()
        ]

    def write_module(self, module: str, writer: ShardWriter) -> dict[str, str]:
        """Write the tensors of one linear, or of fused experts, one expert at a time."""
        if module not in self.pair.backbone.stacks:
            return super().write_module(module, writer)
        specs, hashes = self.specs(module), {}
        stream = writer.piecewise(specs[0].name) if len(specs) == 1 else None
        for expert, weight in enumerate(self.pair.merged_experts(module)):
            tensor = (weight.t() if module in self._transposed else weight).bfloat16()
            if stream is not None:
                stream.add(tensor)
                continue
            for name, part in unfuse(self._model, module, tensor.unsqueeze(0)).items():
                place = _of_expert(name, expert)
                hashes[place] = writer.write(place, part.contiguous())
        return hashes if stream is None else {specs[0].name: stream.finish()}

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        weight = self.pair.merged(module).bfloat16()
        name = self.name_of(f"{module}.weight")
        return {name: weight.t() if module in self._transposed else weight}

    def rounded(self, _module: str, _written: Checkpoint, weight: torch.Tensor) -> torch.Tensor:
        """The sum in 16 bits."""
        return weight.bfloat16().float()

    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        config = {key: value for key, value in self.pair.config.items() if key != "quantization_config"}
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
        return config


def _is_whole(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a checkpoint has one tensor for all experts, as the parameter is."""
    return len(tensors) == 1 and next(iter(tensors.values())).ndim == 3


def _of_expert(name: str, expert: int) -> str:
    """The name of a tensor of an expert, from that of the first expert: the last number is that of the expert."""
    before, _, after = name.rpartition(".0.")
    return f"{before}.{expert}.{after}"
