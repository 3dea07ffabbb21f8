"""Codes and scales of a weight that was quantized and saved in 16 bits again ("fake quantization").

Each value of a block of the original weight became v = round(level[code] · absmax), rounded to the dtype of the file.
Such a value determines its code, because a block has a value at level 1 or −1, so that max |v| = round(absmax), and the
levels are much further apart than the values of the dtype. absmax itself is not in the file. A value v that lies
between the midpoints lo and hi to its neighbours in the dtype is what a reader gets again if

    lo / level <= absmax <= hi / level,

so any absmax in the intersection of the intervals of a block gives the whole block back. The middle is taken, and all
values are compared bit for bit. A weight with a block that no absmax gives back does not lie on the codebook.
"""

from __future__ import annotations

import torch

from loftq.core.codebooks import TABLES, codebook
from loftq.core.kernels import dispatch
from loftq.core.packing import paired
from loftq.core.scales import Scales, Solved

_INTEGERS = {2: torch.int16, 4: torch.int32}  # whose order is that of positive floating-point numbers, by their bytes


def recover(weight: torch.Tensor, table: str, block_size: int) -> Solved | None:
    """Codes, two a byte, and scales of a weight (out, in) whose values, as they are stored, lie on a codebook.

    None if they do not: if decoding, and rounding to the dtype of the weight, would not give each value back.
    """
    if weight.numel() % block_size or weight.dtype.itemsize not in _INTEGERS:
        return None
    codes, scales = [], []
    step = dispatch.step(block_size) // block_size
    for blocks in torch.split(weight.reshape(-1, block_size), step):
        part = _recover_blocks(blocks, codebook(table))
        if part is None:
            return None
        codes.append(part[0].view(-1))
        scales.append(part[1])
    return paired(torch.cat(codes), TABLES[table]), Scales(torch.cat(scales))


def _recover_blocks(blocks: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes uint8 (blocks, block_size) and scales float32 (blocks,) of values in the dtype of the file."""
    exact = blocks.double()
    largest = exact.abs().amax(dim=1, keepdim=True)
    unit = exact / torch.where(largest > 0, largest, 1.0)
    codes = torch.bucketize(unit, ((levels[1:] + levels[:-1]) / 2).double())
    reached = levels.double()[codes].abs()  # (blocks, block_size)
    low, high = _interval(blocks)
    bounded = reached > 0
    least = torch.where(bounded, low / torch.where(bounded, reached, 1.0), 0.0).amax(dim=1)
    most = torch.where(bounded, high / torch.where(bounded, reached, 1.0), torch.inf).amin(dim=1)
    middle = torch.where(most < torch.inf, (least + most) / 2, 0.0)
    for scales in (largest.squeeze(1).float(), middle.float()):
        same = ((levels[codes] * scales.unsqueeze(1)).to(blocks.dtype) == blocks).all(dim=1)
        middle = torch.where(same, scales.double(), middle)
    scales = middle.float()
    if not torch.equal((levels[codes] * scales.unsqueeze(1)).to(blocks.dtype), blocks):
        return None
    return codes.to(torch.uint8), scales


def _interval(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The midpoints between |values| and their neighbours in their dtype, in float64."""
    integers = values.abs().view(_INTEGERS[values.dtype.itemsize])
    magnitude = values.double().abs()
    above = (integers + 1).view(values.dtype).double()
    below = torch.where(integers > 0, (integers - 1).clamp(min=0), 0).view(values.dtype).double()
    return (magnitude + below) / 2, (magnitude + above) / 2


def rounding_error(weight_codes: torch.Tensor, scales: torch.Tensor, table: str, block_size: int) -> float:
    """The root mean square of the error that rounding made, if values were spread evenly in the cells of their codes.

    `weight_codes` are in a byte each, (n,); `scales` are float32 (n / block_size,).
    """
    levels = codebook(table).double()
    edges = torch.cat([levels[:1], (levels[1:] + levels[:-1]) / 2, levels[-1:]])
    variances = (edges[1:] - edges[:-1]).square() / 12  # of a value that lies anywhere in a cell
    squares = variances[weight_codes.long()].view(-1, block_size).mean(dim=1)  # (blocks,)
    return float((squares * scales.double().square()).mean().sqrt())
