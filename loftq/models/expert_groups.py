"""Packed experts in groups: those of a group are unpacked together, and multiplied by their tokens in one product.

A group has at most so many weights as `group_size` allows, or a single expert. So the dense weights that exist at a
time are those of a few experts, whatever the size of the stack.

`grouped_product` is torch's grouped matrix product where the device has one, and else a loop over the experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import nn

from loftq.core.codebooks import CODEBOOKS
from loftq.core.grid import Grid
from loftq.core.trellis import TrellisCode
from loftq.formats import native, trellis_streams
from loftq.formats.layouts import Layout
from loftq.models.devices import has_grouped_products
from loftq.models.packed_linear import dequantize, read_shifted_scales

WEIGHTS_ON_CPU = 1 << 24  # weights that are unpacked at a time; four times as many were slower
WEIGHTS_ON_GPU = 1 << 26  # fewer groups need fewer launches
ALIGNMENT = 16  # bytes; torch's grouped product wants rows of a multiple of it
Stored = Sequence[torch.Tensor | None]  # codes and scales in the order of `PackedStack.suffixes`, the experts first


_SUFFIXES = {
    False: ("", "_scales", "_scales_absmax", "_scales_offset", "_zeros", "_shifts"),
    True: tuple(name.removeprefix(native.WEIGHT) for name in trellis_streams.TENSORS),
}


@dataclass(frozen=True)
class PackedStack:
    """The type of the packed weights of a parameter, and their shape (experts, out, in)."""

    grid: Grid
    shape: tuple[int, int, int]
    compute_dtype: torch.dtype

    @property
    def layout(self) -> Layout:
        """The layout of its codes and scales."""
        return trellis_streams if self.grid.trellis else native

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What follows the name of the parameter in the names of its tensors, that of the codes first."""
        return _SUFFIXES[self.grid.trellis]


class Group(NamedTuple):
    """Some experts in their order, and the places of their pairs (token, choice), sorted by expert."""

    experts: list[int]
    counts: list[int]  # of the pairs of each expert
    pairs: torch.Tensor  # (pairs,)
    ends: torch.Tensor  # int32 (experts,): where each expert's pairs end

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part (experts of the group, …) of a tensor (experts, …): a view where the experts are consecutive."""
        first, last = self.experts[0], self.experts[-1] + 1
        return tensor[first:last] if last - first == len(self.experts) else tensor[self.experts]


def group_size(stacks: Mapping[str, PackedStack], device: torch.device) -> int:
    """Number of a module's experts in a group on a device."""
    weights = sum(stack.shape[1] * stack.shape[2] for stack in stacks.values())
    return max((WEIGHTS_ON_CPU if device.type == "cpu" else WEIGHTS_ON_GPU) // weights, 1)


def groups_of(top_k_index: torch.Tensor, stacks: Mapping[str, PackedStack]) -> list[Group]:
    """Group the experts that any pair (token, choice) names. A number that is no expert's leaves a choice out."""
    experts, size = next(iter(stacks.values())).shape[0], group_size(stacks, top_k_index.device)
    flat = top_k_index.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat.clamp(0, experts), minlength=experts + 1)[:experts].tolist()
    chosen = [expert for expert, count in enumerate(counts) if count]
    groups, first = [], 0
    for start in range(0, len(chosen), size):
        members = chosen[start : start + size]
        own = [counts[expert] for expert in members]
        last = first + sum(own)
        ends = torch.tensor(own).cumsum(0).to(flat.device, torch.int32)
        groups.append(Group(members, own, order[first:last], ends))
        first = last
    return groups


def unpack_group(stack: PackedStack, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """The weights (experts, out, in) of the experts whose codes and scales are `stored`."""
    _, rows, columns = stack.shape
    if stack.grid.trellis:
        return _decode_group(stack, cast(Sequence[torch.Tensor], stored), dtype)
    name, block = stack.grid.codebook, stack.grid.block(columns)
    packed, rest = cast(torch.Tensor, stored[0]), stored[1:]
    scales, absmax, _, zeros, shifts = rest
    if absmax is not None or zeros is not None:  # these are read expert by expert
        each = [
            read_shifted_scales(CODEBOOKS[name], *[None if tensor is None else tensor[expert] for tensor in rest])
            for expert in range(len(packed))
        ]
        scales = torch.stack([values for values, _ in each])
        shifts = None if each[0][1] is None else torch.stack([cast(torch.Tensor, shift) for _, shift in each])
    values = cast(torch.Tensor, scales).flatten()
    shifts = None if shifts is None else shifts.flatten()
    # An expert's codes are whole bytes, so that those of several experts are one stream.
    return dequantize(packed.flatten(), values, shifts, name, block, columns, dtype).view(-1, rows, columns)


def _decode_group(stack: PackedStack, stored: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weights (experts, out, in) of trellis codes, a view of their transposes."""
    _, rows, columns = stack.shape
    out = torch.empty(len(stored[0]), columns, rows, dtype=dtype, device=stored[0].device)
    for expert, (codes, widths, scales, inputs) in enumerate(zip(*stored, strict=True)):
        out[expert] = TrellisCode(codes, widths, scales, inputs, stack.grid.state_bits).decode(dtype=dtype).T
    return out.transpose(1, 2)


def grouped_product(x: torch.Tensor, weights: torch.Tensor, group: Group) -> torch.Tensor:
    """The products x Wᵀ (pairs, out) of the pairs x (pairs, in) with their experts' weights (experts, out, in)."""
    sides = (*x.shape[1:], *weights.shape[1:])
    if len(weights) > 1 and has_grouped_products(x) and all(side * x.itemsize % ALIGNMENT == 0 for side in sides):
        product: torch.Tensor = nn.functional.grouped_mm(x, weights.transpose(1, 2), offs=group.ends)
        return product
    parts = [part @ weight.T for part, weight in zip(torch.split(x, group.counts), weights, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def low_rank_product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, group: Group) -> torch.Tensor:
    """The products (x Aᵀ) Bᵀ of the pairs x with their experts' A (experts, rank, in) and B (experts, out, rank).

    It is computed in the dtype of the factors. Ranks are filled up with zeros where torch's product wants that.
    """
    missing = -a.shape[1] % max(ALIGNMENT // a.itemsize, 1) if len(a) > 1 else 0
    a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing)).contiguous()
    return grouped_product(grouped_product(x.to(a.dtype), a, group), b, group)


def runs(experts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The ranges (first, last + 1) of consecutive numbers in a sorted list, which is not empty."""
    edges = [i for i, (one, other) in enumerate(pairwise(experts), 1) if other != one + 1]
    for first, last in pairwise([0, *edges, len(experts)]):
        yield experts[first], experts[last - 1] + 1
