"""Affine weights to export, and pico models that consist of them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from loftq.core.affine import AffineQuantizer, AffineWeight
from loftq.core.packing import single


def affine_of(weight: torch.Tensor, bits: int, group_size: int, *, halves: bool = False) -> AffineWeight:
    """A weight quantized with floating zero-points, then merged: its shifts are no longer of 16 bits.

    With `halves`, scales and biases are numbers that float16 has.
    """
    rows, _ = weight.shape
    quantizer = AffineQuantizer(f"int{bits}", group_size, "float", scale_dtype=torch.float16)
    codes, scales = quantizer.quantize(weight.float().contiguous())
    assert scales.shifts is not None
    grid = scales.values.view(rows, -1)
    shifts = (
        scales.shifts.view(rows, -1) + torch.randn(grid.shape, generator=torch.Generator().manual_seed(rows)) * grid
    )
    if halves:
        shifts = (shifts - grid * 2 ** (bits - 1)).half().float() + grid * 2 ** (bits - 1)
    return AffineWeight(single(codes, bits).view(weight.shape), grid, shifts, bits)


def random_affine(rows: int, columns: int, bits: int, group_size: int, *, halves: bool = False) -> AffineWeight:
    """An affine weight of random values that lie off zero."""
    generator = torch.Generator().manual_seed(rows + bits + group_size)
    return affine_of(torch.randn(rows, columns, generator=generator) + 0.3, bits, group_size, halves=halves)


def linears_of(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The linears of the blocks, by module name."""
    named = model.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, torch.nn.Linear) and ".layers." in name}


def quantized(
    model: PreTrainedModel, bits: int, group_size: int, *, halves: bool = False
) -> tuple[dict[str, AffineWeight], PreTrainedModel]:
    """Affine weights of all linears of the blocks, and the model in float32 that holds their decoded values."""
    linears = linears_of(model).items()
    found = {name: affine_of(layer.weight.data, bits, group_size, halves=halves) for name, layer in linears}
    dense = type(model)(model.config).eval()  # anew, since `bfloat16()` rounds rotary frequencies for good
    dense.load_state_dict(model.state_dict())
    for name, layer in linears_of(dense).items():
        layer.weight.data = found[name].decode()
    return found, dense
