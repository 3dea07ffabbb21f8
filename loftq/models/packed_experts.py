"""Fused experts whose weights stay packed, in the place of an experts module of transformers.

Each parameter holds the codes of all experts, (experts, bytes) or (experts, words), and its scales lie beside it
(`formats.native`, `formats.trellis_streams`).
`expert_pass` computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from loftq.core.grid import Grid
from loftq.errors import OptionError
from loftq.models.expert_groups import PackedStack, unpack_group
from loftq.models.expert_pass import ActiveFactors, experts_forward


class Packed(NamedTuple):
    """The packed weights of a module: the types of its parameters, their codes, and the scales by name."""

    stacks: dict[str, PackedStack]
    codes: dict[str, nn.Parameter]
    scales: dict[str, torch.Tensor | None]


def pack_module(module: Any, stacks: dict[str, PackedStack], device: torch.device | str | None = None) -> None:
    """Replace the parameters of an experts module by packed ones, which are to be loaded, and its code by ours."""
    for name, stack in stacks.items():
        for spec in stack.layout.specs(name, stack.shape, stack.grid, stack.compute_dtype):
            tensor = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            if spec.name == name:
                module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                module.register_buffer(spec.name, tensor)
    _take_place(module, stacks)


def _take_place(module: Any, stacks: dict[str, PackedStack]) -> None:
    """Put our code in the place of the own code of an experts module."""
    module.packed_stacks = stacks
    module.active_factors = {}
    kind = type(module)
    module.__class__ = type(kind.__name__, (PackedExperts, kind), {"__module__": kind.__module__, "dense_class": kind})


def pack_stacks(
    model: nn.Module, types: Mapping[str, tuple[Grid, Sequence[int]]], device: torch.device | str | None = None
) -> None:
    """Pack parameters of fused experts, by name with the types of their weights and their shapes (experts, out, in)."""
    owners: dict[str, dict[str, PackedStack]] = {}
    for name, (grid, shape) in types.items():
        owner, _, last = name.rpartition(".")
        experts, rows, columns = shape
        dtype = model.get_parameter(name).dtype
        owners.setdefault(owner, {})[last] = PackedStack(grid, (experts, rows, columns), dtype)
    for owner, stacks in owners.items():
        pack_module(model.get_submodule(owner), stacks, device)


class PackedExperts(nn.Module):
    """What `pack_module` puts before the class of an experts module."""

    packed_stacks: dict[str, PackedStack]
    active_factors: dict[str, list[ActiveFactors]]  # by parameter, while a wrapper of peft calls the module
    dense_class: type[nn.Module]
    offloaded: bool = False  # whether the packed tensors stay in main memory wherever the module goes

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum over the chosen experts of a token: (tokens, width) from (tokens, width), and two (tokens, k)."""
        out: torch.Tensor = experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return out

    def stored(self, name: str) -> list[torch.Tensor | None]:
        """The tensors of a parameter's experts, in the order in which `unpack_group` reads them."""
        return [getattr(self, f"{name}{suffix}", None) for suffix in self.packed_stacks[name].suffixes]

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """The codes and scales of all parameters, by name."""
        names = [f"{name}{suffix}" for name, stack in self.packed_stacks.items() for suffix in stack.suffixes]
        own = {**self._parameters, **self._buffers}
        return {name: cast(torch.Tensor, own[name]) for name in names if own.get(name) is not None}

    def dequantize(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weights of a parameter's experts, as the module's own class keeps them."""
        stack, stored = self.packed_stacks[name], self.stored(name)
        dense = torch.empty(stack.shape, dtype=dtype, device=self._parameters[name].device)  # type: ignore[union-attr]
        for expert in range(len(dense)):
            one = [None if tensor is None else tensor[expert : expert + 1] for tensor in stored]
            dense[expert] = unpack_group(stack, one, dtype)[0]
        return dense.transpose(1, 2).contiguous() if cast(Any, self).is_transposed else dense

    def change_dtype(self, dtype: torch.dtype) -> None:
        """Set the dtype of dense weights."""
        self.packed_stacks = {name: replace(stack, compute_dtype=dtype) for name, stack in self.packed_stacks.items()}

    def to_dense(self, dtype: torch.dtype | None = None) -> Packed:
        """Put dense weights in the place of the packed ones, and the module's own code in the place of ours.

        The packed weights are returned, for `to_packed`. Raises OptionError for experts in main memory.
        """
        if self.offloaded:
            raise OptionError("experts in main memory cannot be made dense or merged: load the model without offload")
        packed = Packed(self.packed_stacks, {}, {})
        for name, stack in self.packed_stacks.items():
            dense = self.dequantize(name, dtype or stack.compute_dtype)
            packed.codes[name] = cast(nn.Parameter, self._parameters[name])
            for key in (f"{name}{suffix}" for suffix in stack.suffixes[1:]):
                if key in self._buffers:
                    packed.scales[key] = self._buffers.pop(key)
            self.register_parameter(name, nn.Parameter(dense, requires_grad=False))
        del self.packed_stacks, self.active_factors
        cast(Any, self).__class__ = self.dense_class
        return packed

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Codes and scales move to another device unless they are offloaded, but never change their dtype.
        packed = self.packed_tensors()
        tables: tuple[dict[str, Any], ...] = (self._parameters, self._buffers)
        if self.offloaded:
            kept = [{name: table.pop(name) for name in packed if name in table} for table in tables]
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for table, own in zip(tables, kept, strict=True):
                table.update(own)
            return self
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in packed.items():
            moved = self._buffers.get(name)
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


def to_packed(module: nn.Module, packed: Packed) -> None:
    """Undo `PackedExperts.to_dense`."""
    for name, codes in packed.codes.items():
        module.register_parameter(name, codes)
    for name, scales in packed.scales.items():
        module.register_buffer(name, scales)
    _take_place(module, packed.stacks)
