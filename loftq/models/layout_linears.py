"""Quantized weights as those who load a folder read them: by bitsandbytes itself, or by the linears that we load."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loftq.core.grid import Grid
from loftq.formats import bitsandbytes as layout
from loftq.formats import gptq

Reader = Callable[[str], torch.Tensor]  # of a tensor, by its name


def read_weight(format: str, module: str, shape: Sequence[int], grid: Grid, read: Reader) -> torch.Tensor:
    """What the stored tensors of a linear stand for: float32 (out, in)."""
    if format == "bitsandbytes":
        return _by_bitsandbytes(module, shape, grid, read)
    return _by_our_linear(format, module, shape, grid, read)


def _by_bitsandbytes(module: str, shape: Sequence[int], grid: Grid, read: Reader) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    names = [spec.name for spec in layout.specs(module, shape, grid, torch.float32)]
    codes, *others = (read(name) for name in names)
    found: torch.Tensor
    if grid.bits == 8:
        found = int8_vectorwise_dequant(codes, others[0])
        return found
    stored = {name.removeprefix(f"{names[0]}."): part for name, part in zip(names[1:], others, strict=True)}
    state = QuantState.from_dict(stored, codes.device)
    state.dtype = torch.float32  # rather than rounded to the compute dtype
    found = dequantize_4bit(codes, state)
    return found


def _by_our_linear(format: str, module: str, shape: Sequence[int], grid: Grid, read: Reader) -> torch.Tensor:
    from loftq.models.gptq_linear import GptqLinear
    from loftq.models.packed_linear import PackedLinear

    linear = (GptqLinear if format == "gptq" else PackedLinear)(shape[1], shape[0], False, grid=grid)
    linear.load_state_dict({name: read(f"{module}.{name}") for name in linear.state_dict()})
    if isinstance(linear, GptqLinear):
        linear.ordered = gptq.is_ordered(linear.g_idx, grid.block(shape[1]))
    return linear.dequantize()
