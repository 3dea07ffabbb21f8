"""The names that a merged model has in checkpoints, where those of a mixture differ from transformers' parameters.

Servers read only the names of published checkpoints: most have a tensor for each matrix of each expert, where
transformers has one parameter for all experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod

import torch
from torch import nn

from loftq.models.expert_stacks import find_stacks
from loftq.models.linears import find_linears
from loftq.models.naming import unfuse


class CheckpointNames:
    """Names and layout of tensors in checkpoints of a model, which is on the meta device."""

    def __init__(self, model: nn.Module, *, mixture: bool) -> None:
        self._model, self._mixture = model, mixture

    def of(self, name: str) -> str:
        """The name of a parameter that becomes a single tensor."""
        return self._renamed.get(name, name)

    def of_linear(self, module: str) -> str:
        """The name of a linear: that of its weight without the last part."""
        return self.of(f"{module}.weight").rpartition(".")[0]

    def of_expert(self, module: str, weight: torch.Tensor, expert: int = 0) -> dict[str, torch.Tensor]:
        """The tensors, by name, of the weight (out, in) of one expert of a parameter.

        If checkpoints have one tensor for all experts, the result is the part (1, …) of this expert under its name.
        """
        matrix = weight.t() if module in self.transposed else weight
        tensors = unfuse(self._model, module, matrix.unsqueeze(0))
        return tensors if is_whole(tensors) else {at_expert(name, expert): t for name, t in tensors.items()}

    def expert_of(self, module: str, tensors: Mapping[str, torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """The weight (out, in) of one expert from its tensors in the order of `of_expert`: the inverse of it."""
        places = self.of_expert(module, torch.arange(prod(shape)).view(*shape)).values()
        weight = torch.empty(prod(shape))
        for place, tensor in zip(places, tensors.values(), strict=True):
            weight[place.reshape(-1)] = tensor.reshape(-1).float()
        return weight.view(*shape)

    @cached_property
    def transposed(self) -> set[str]:
        """The linears and fused experts whose parameters are stored as (in, out)."""
        linears = {name for name, linear in find_linears(self._model).candidates.items() if linear.transposed}
        return linears | {name for name, stack in find_stacks(self._model).candidates.items() if stack.transposed}

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """The names in checkpoints of the parameters of a mixture that each become a single tensor."""
        state = self._model.state_dict() if self._mixture else {}
        names = {key: list(unfuse(self._model, key, tensor)) for key, tensor in state.items()}
        return {key: found[0] for key, found in names.items() if len(found) == 1}


def is_whole(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a checkpoint has one tensor for all experts, as the parameter is."""
    return len(tensors) == 1 and next(iter(tensors.values())).ndim == 3


def at_expert(name: str, expert: int) -> str:
    """The name of a tensor of an expert, from that of the first expert: the last number is that of the expert."""
    before, _, after = name.rpartition(".0.")
    return f"{before}.{expert}.{after}"
