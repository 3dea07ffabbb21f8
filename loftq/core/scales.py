"""Scales as they are stored and read back, so that codes are chosen under the values that a reader will use.

Scales are stored in float32 or float16, or with double quantization (QLoRA, arXiv 2305.14314, section 3) in 8 bits:

    scale~ = dynamic_map[c] * absmax_of_256(scale − mean) + mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from loftq.core.codebooks import dynamic_map

SCALE_BLOCK = 256  # scales that share one float32 under double quantization, as in bitsandbytes


@dataclass(frozen=True)
class NestedScales:
    """Scales stored in 8 bits: codes uint8 (blocks,), absmax float32 (blocks / 256 rounded up,), and the mean."""

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: float  # the mean, which was subtracted before scales were rounded

    def decode(self) -> torch.Tensor:
        """The float32 scales that a reader of the codes gets, computed in bitsandbytes' order of operations."""
        levels = dynamic_map().to(self.codes.device)[self.codes.int()]
        spread = self.absmax.repeat_interleave(SCALE_BLOCK)[: len(levels)]
        return levels * spread + self.offset


@dataclass(frozen=True)
class Scales:
    """Scales and zero-points of a weight's blocks as a reader will get them: (blocks,) each.

    `values` are the scales in float32, and `nested` their 8-bit form if they are doubly quantized. Groups of integers
    may also have zero-points: `shifts` float32 are added to level times scale, and `zeros` uint8 are the zero-points
    themselves if they are whole numbers.
    """

    values: torch.Tensor
    nested: NestedScales | None = None
    shifts: torch.Tensor | None = None
    zeros: torch.Tensor | None = None

    @property
    def offsets(self) -> torch.Tensor:
        """The shifts, or zeros if there are none."""
        return torch.zeros_like(self.values) if self.shifts is None else self.shifts


Solved = tuple[torch.Tensor, Scales]  # a weight's codes, in the solver's form, and its scales


def stored_scales(exact: torch.Tensor, dtype: torch.dtype, double_quant: bool, unit: float = 1.0) -> Scales:
    """Scales float32 (blocks,) as they are read back from their stored form.

    They are those of a weight that was divided by `unit`; the stored form has those of the weight itself.
    """
    if unit != 1:
        own = (exact.double() * unit).clamp(max=torch.finfo(torch.float32).max).float()
        stored = stored_scales(own, dtype, double_quant)
        return replace(stored, values=(stored.values.double() / unit).float())
    if double_quant:
        nested = encode_scales(exact)
        return Scales(nested.decode(), nested)
    return Scales(representable(exact, dtype))


def representable(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of at least 0 as they are read back from a dtype: only zeros become zero, and none becomes infinite."""
    if dtype == torch.float32:
        return exact
    kind = torch.finfo(dtype)
    return torch.where(exact > 0, exact.clamp(kind.tiny * kind.eps, kind.max), 0).to(dtype).float()


def encode_scales(scales: torch.Tensor) -> NestedScales:
    """Quantize scales float32 (blocks,) to 8 bits (double quantization)."""
    table = dynamic_map().to(scales.device)
    offset = scales.double().mean().float()  # in float32 its last bits would depend on the number of threads
    centered = torch.nn.functional.pad(scales - offset, (0, -len(scales) % SCALE_BLOCK))
    groups = centered.view(-1, SCALE_BLOCK)  # (ceil(blocks / 256), 256)
    absmax = groups.abs().amax(dim=1)
    unit = groups / absmax.clamp(min=1e-38).unsqueeze(1)
    codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
    return NestedScales(codes.view(-1)[: len(scales)].contiguous(), absmax, offset.item())
