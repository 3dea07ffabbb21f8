"""Every layout reads back what it wrote."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loftq.core.affine import AffineWeight
from loftq.core.grid import ROW, Grid
from loftq.formats.layouts import LAYOUTS

CASES = [
    *(("bitsandbytes", Grid("nf4", 64, double)) for double in (False, True)),
    *(("bitsandbytes-fsdp", Grid("nf4", 64, double)) for double in (False, True)),
    ("bitsandbytes", Grid("int8", ROW, zero_point="symmetric")),
    *(("gptq", Grid(f"int{b}", 32, zero_point=zero)) for b in (2, 3, 4, 8) for zero in ("symmetric", "integer")),
    *(("loftq", Grid(f"nf{bits}", 32, double)) for bits in (2, 3, 4) for double in (False, True)),
    *(
        ("loftq", Grid(f"int{bits}", group, double, zero))
        for bits in (2, 3, 4, 8)
        for group in (16, ROW)
        for double in (False, True)
        for zero in ("symmetric", "integer", "float", "float32")
    ),
]


ODD = [("loftq", replace(grid, block_size=8)) for name, grid in CASES if name == "loftq" and grid.block_size != ROW]
EVERY = [
    *((*case, (96, 320)) for case in CASES),
    *((*case, (7, 40)) for case in ODD),
    *((*case, (1, 8)) for case in ODD),
    *((*case, (5, 24)) for case in CASES if case[0] != "gptq" and case[1].block_size == ROW),
    *((*case, (32, 32)) for case in CASES if case[0] == "gptq"),
]


@pytest.mark.parametrize(("format", "grid", "shape"), EVERY, ids=str)
def test_what_was_written_is_read(format: str, grid: Grid, shape: tuple[int, int]) -> None:
    """Oracle: the codes and scales before, bit for bit, and the quantizer's own decoding."""
    layout = LAYOUTS[format]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.2
    quantizer = grid.quantizer(shape[1], layout.SCALE_DTYPE)
    codes, scales = quantizer.quantize(weight)
    tensors = layout.tensors("m", shape, grid, torch.bfloat16, codes, scales)
    assert [(s.name, s.dtype, s.shape) for s in layout.specs("m", shape, grid, torch.bfloat16)] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    again, found = layout.read("m", shape, grid, tensors.__getitem__)
    assert torch.equal(again, codes)
    if grid == Grid("int8", ROW, zero_point="symmetric") and format == "bitsandbytes":
        torch.testing.assert_close(found.values, scales.values, rtol=3e-7, atol=0)  # times and by 127
        return
    assert torch.equal(found.values, scales.values)
    if scales.shifts is not None:
        assert torch.equal(found.shifts, scales.shifts)
    if scales.zeros is not None:
        assert torch.equal(found.zeros, scales.zeros)
    decoded = quantizer.decode(again, found, weight.shape)
    assert torch.equal(decoded, quantizer.decode(codes, scales, weight.shape))
    if grid.codebook.startswith("int"):
        unpacked = AffineWeight.of(again, found, shape, grid.bits)
        torch.testing.assert_close(unpacked.decode(), decoded, rtol=1e-6, atol=1e-7)
        biased = unpacked.codes.view(shape[0], -1, unpacked.group_size) * unpacked.scales.unsqueeze(2)
        torch.testing.assert_close((biased + unpacked.biases.unsqueeze(2)).view(shape), decoded, rtol=1e-4, atol=1e-5)
