"""The plan of a run: everything that is decided and checked, from headers only, before the first weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import nn

from loftq.core.grid import Decoder, Grid
from loftq.formats.checkpoint import Shard, TensorSpec
from loftq.formats.layouts import LAYOUTS, Layout
from loftq.hub.source import Source
from loftq.models import linears
from loftq.models.tasks import Task
from loftq.planning.recipe import Recipe


@dataclass(frozen=True)
class Layer:
    """A linear to quantize: its module, the name of its tensor in the checkpoint, and its shape (out, in).

    If `transposed`, the stored tensor is (in, out). For fused experts, `module` is the name of the parameter, and the
    shape is (experts, out, in). If the checkpoint has tensors for each expert, `parts` lists them, each with the
    pattern of transformers' renaming that it matches, and `tensor` is the name of the parameter.
    """

    module: str
    tensor: str
    shape: tuple[int, ...]
    transposed: bool = False
    bits: float = 4
    rank: int = 0
    parts: tuple[tuple[tuple[str, str], ...], ...] = ()

    @property
    def weights(self) -> int:
        """The number of its weights."""
        return prod(self.shape)

    @property
    def experts(self) -> int:
        """The number of its experts; 0 for a linear."""
        return self.shape[0] if len(self.shape) == 3 else 0

    @property
    def owner(self) -> str:
        """The module that has the parameter of fused experts."""
        return self.module.rpartition(".")[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape (out, in) of the linear, or of each expert."""
        return self.shape[-2], self.shape[-1]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors of the checkpoint that hold its weights."""
        return tuple(name for expert in self.parts for name, _ in expert) or (self.tensor,)


@dataclass(frozen=True)
class Plan:
    """The form in which every tensor is written, and its place in the files."""

    recipe: Recipe
    source: Source
    model: nn.Module  # on the meta device
    task: Task
    layers: tuple[Layer, ...]
    passed: Mapping[str, TensorSpec]  # tensors of the source that are not quantized, and what they are written as
    created: Mapping[str, TensorSpec]  # parameters that no tensor of the source provides
    backbone: tuple[Shard, ...]
    adapter: Shard
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    skip_modules: tuple[str, ...]
    format: str  # a name of LAYOUTS
    notes: tuple[str, ...]

    @property
    def model_type(self) -> str:
        """The name of the architecture in transformers."""
        return str(self.model.config.model_type)  # type: ignore[union-attr]

    @property
    def layout(self) -> Layout:
        """The layout of quantized linears on disk."""
        return LAYOUTS[self.format]

    @property
    def stock(self) -> bool:
        """Whether stock transformers and peft load the result."""
        return self.layout.STOCK

    @property
    def kind(self) -> str:
        """The kind of the artifact. `loftq.load_{kind}` loads it."""
        return "qlora" if self.recipe.pool_size is None else "qalora"

    @property
    def linears(self) -> tuple[Layer, ...]:
        """The layers that are linears."""
        return tuple(layer for layer in self.layers if not layer.experts)

    @property
    def stacks(self) -> tuple[Layer, ...]:
        """The layers that are fused experts."""
        return tuple(layer for layer in self.layers if layer.experts)

    @property
    def observed(self) -> dict[str, int]:
        """The modules whose inputs a calibration observes, with the number of their inputs: linears, then experts."""
        sizes = {layer.module: layer.matrix[1] for layer in self.linears}
        first: dict[str, int] = {}
        for layer in self.stacks:  # the first projection of a module comes first
            first.setdefault(layer.owner, layer.matrix[1])
        return sizes | first

    def grid(self, layer: Layer) -> Grid:
        """The type of a layer's weight."""
        return self.recipe.grid(layer.bits)

    def decoder(self, layer: Layer, width: float | None = None) -> Decoder:
        """The quantizer of a layer, at its own width or another, with scales as the format stores them."""
        return self.recipe.grid(width or layer.bits).decoder(layer.matrix[1], self.layout.SCALE_DTYPE)

    @property
    def codebooks(self) -> dict[str, str]:
        """The codebook of each quantized module."""
        return {layer.module: self.grid(layer).codebook for layer in self.layers}

    @property
    def quantized_names(self) -> list[str]:
        """Ends of names that match only the quantized modules: peft's target modules, or else the full names."""
        wanted = {layer.module for layer in self.linears}
        reached = {name for name, _ in self.model.named_modules() if name.endswith(self.target_modules)}
        return list(self.target_modules if reached == wanted else sorted(wanted))

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of the fused experts that are not quantized."""
        quantized = {layer.module for layer in self.stacks}
        left = {name: size for name, size in linears.fused_experts(self.model).items() if name not in quantized}
        return sum(left.values()) * self.recipe.dtype.itemsize

    @cached_property
    def layer_bits(self) -> float:
        """Bits per weight of the quantized linears, including scales and zero-points."""
        stored = sum(self._stored(layer) for layer in self.layers)
        return 8 * stored / self.weights

    @cached_property
    def weights(self) -> int:
        """Weights in the quantized linears."""
        return sum(layer.weights for layer in self.layers)

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(spec.nbytes for spec in self.source.checkpoint.tensors.values())

    @property
    def backbone_bytes(self) -> int:
        """Bytes of the backbone's files."""
        return sum(shard.nbytes for shard in self.backbone)

    @property
    def trained_parameters(self) -> int:
        """Number of parameters of the adapter: its factors, and a head that is trained with them."""
        return sum(spec.numel for _, spec in self.adapter.offsets.values())

    def bits_of(self, layer: Layer) -> float:
        """Bits per weight of one layer on disk."""
        return 8 * self._stored(layer) / layer.weights

    def _stored(self, layer: Layer) -> int:
        specs = self.layout.specs(layer.module, layer.shape, self.grid(layer), self.recipe.dtype)
        return sum(spec.nbytes for spec in specs)


def adapted_names(plan: Plan) -> dict[str, Any]:
    """The settings of a LoRA's configuration that say what is adapted, and with which rank if that differs."""
    names, recipe = plan.target_parameters, plan.recipe
    modules = {"target_modules": list(plan.target_modules)}
    if not names:
        return modules
    ranks, alphas = dict.fromkeys(names, recipe.expert_rank), dict.fromkeys(names, recipe.expert_alpha)
    return {**modules, "target_parameters": list(names), "rank_pattern": ranks, "alpha_pattern": alphas}
