"""Quantization to a codebook in blocks: computes scales and codes, and decodes them.

A weight W (out, in) is read row by row as blocks of `block_size` consecutive values. Each block has one scale,
its largest magnitude unless a better one is given, and each value becomes the nearest level:

    code = #{ midpoints of the codebook below W / scale },     W~ = level[code] * scale.

Two codes share a byte, the first in the high half (bitsandbytes' order for 4 bits). Codes are chosen under the
scales as they will be read back (`scales`), so that they account for the rounding of the scales too.

On the CPU the loops are compiled (`kernels`); elsewhere the same arithmetic runs in torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch

from loftq.core.codebooks import TABLES, codebook
from loftq.core.kernels import blocks, dispatch
from loftq.core.packing import paired
from loftq.core.scales import Scales, stored_scales
from loftq.errors import OptionError, UnknownNameError


@dataclass(frozen=True)
class BlockQuantizer:
    """A codebook applied in blocks.

    `codebook` is a name in `codebooks.TABLES`; `block_size` is a multiple of 8 and divides the number of values.
    Codes are chosen under the scales as they will be stored.
    Tensors are float32 and contiguous; a block of zeros has a scale of zero.
    """

    codebook: str
    block_size: int = 64
    double_quant: bool = False
    scale_dtype: torch.dtype = torch.float32  # the dtype of stored scales, unless they are doubly quantized
    unit: float = 1.0  # weights were divided by it, and scales are stored times it

    def __post_init__(self) -> None:
        if self.codebook not in TABLES:
            raise UnknownNameError("codebook", self.codebook, TABLES)
        if self.block_size < 8 or self.block_size % 8:
            raise OptionError(f"block size {self.block_size} is not a multiple of 8")

    def in_unit(self, unit: float) -> Self:
        """The quantizer of the weight divided by `unit`."""
        return replace(self, unit=unit)

    @property
    def _rounds_scales(self) -> bool:
        return self.double_quant or self.scale_dtype != torch.float32

    @cached_property
    def levels(self) -> torch.Tensor:
        """The codebook: float32 (levels,)."""
        return codebook(self.codebook)

    @cached_property
    def _boundaries(self) -> torch.Tensor:
        midpoints = (self.levels[:-1] + self.levels[1:]) / 2
        return torch.cat([midpoints, torch.tensor([torch.inf])])  # an even number, because kernels take them in pairs

    @cached_property
    def _padded_levels(self) -> torch.Tensor:
        return torch.cat([self.levels, self.levels[-1:]])

    def scales(self, weight: torch.Tensor, correction: torch.Tensor | None = None) -> Scales:
        """Scales of `weight - correction`: each block's largest magnitude, doubly quantized if `double_quant`."""
        return self.covering(self.extent(weight, correction))

    def extent(self, weight: torch.Tensor, correction: torch.Tensor | None = None) -> torch.Tensor:
        """The largest magnitude in each block of `weight - correction`: float32 (blocks,)."""
        if dispatch.on_cpu(weight):
            return blocks.absmax(weight, correction, self.block_size)
        target = weight if correction is None else weight - correction
        return target.view(-1, self.block_size).abs().amax(dim=1)

    def covering(self, extent: torch.Tensor, factor: torch.Tensor | float = 1.0, *, nested: bool = True) -> Scales:
        """Scales whose grid reaches to `factor` times an extent, doubly quantized if `nested` and `double_quant`."""
        return stored_scales(extent * factor, self.scale_dtype, self.double_quant and nested, self.unit)

    def encode(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Codes under given scales, two in each byte: uint8 (numel / 2,)."""
        if dispatch.on_cpu(weight):
            codes, _ = blocks.encode_blocks(weight, self._boundaries, self.block_size, scales.values)
            return codes
        parts = []
        for values, scale in self._chunks(weight, scales.values):
            parts.append(paired(self._codes(values, scale).to(torch.uint8), TABLES[self.codebook]))
        return torch.cat(parts)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, Scales]:
        """Codes and scales of a weight, in one pass if scales are stored without rounding."""
        if dispatch.on_cpu(weight) and not self._rounds_scales:
            codes, absmax = blocks.encode_blocks(weight, self._boundaries, self.block_size)
            return codes, Scales(absmax)
        scales = self.scales(weight)
        return self.encode(weight, scales), scales

    def decode(self, codes: torch.Tensor, scales: Scales, shape: torch.Size) -> torch.Tensor:
        """Levels times scales: float32 of `shape`."""
        levels = torch.zeros(16)
        levels[: len(self.levels)] = self.levels
        pairs = torch.cartesian_prod(levels, levels).to(codes.device)  # of each byte: (256, 2)
        out = torch.empty(shape, device=codes.device)
        parts = torch.split(codes, self._step // 2)
        for (target, scale), part in zip(self._chunks(out, scales.values), parts, strict=True):
            values = torch.index_select(pairs, 0, part.int()).view(-1, self.block_size)
            torch.mul(values, scale.unsqueeze(1), out=target.view(-1, self.block_size))
        return out

    def residual(
        self,
        weight: torch.Tensor,
        correction: torch.Tensor | None,
        out: torch.Tensor,
        scales: Scales | None = None,
    ) -> float:
        """Compute `out = W − decode(encode(W − correction))` and return its squared norm. `out` may be `correction`.

        The scales are those of `W − correction`, unless others are given.
        """
        if dispatch.on_cpu(weight):
            if scales is None and self._rounds_scales:
                scales = self.scales(weight, correction)
            values = None if scales is None else scales.values
            table = self._padded_levels
            return blocks.residual(weight, correction, out, self._boundaries, table, self.block_size, values)
        target = weight if correction is None else weight - correction
        levels = self.levels.to(weight.device)
        parts = self._chunks(target, (scales or self.scales(target)).values)
        rounded = (
            levels[self._codes(values, scale)].view(-1, self.block_size) * scale.unsqueeze(1) for values, scale in parts
        )
        return dispatch.subtract(weight, rounded, self.block_size, out)

    @property
    def _step(self) -> int:
        return dispatch.step(self.block_size)

    def _chunks(self, weight: torch.Tensor, scales: torch.Tensor) -> zip[tuple[torch.Tensor, torch.Tensor]]:
        blocks = self._step // self.block_size
        return zip(torch.split(weight.view(-1), self._step), torch.split(scales, blocks), strict=True)

    def _codes(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        inverse = 1 / torch.where(scale.abs() > 1e-38, scale, 1e-38)
        unit = values.view(-1, self.block_size) * inverse.unsqueeze(1)
        return torch.bucketize(unit, self._boundaries.to(values.device), out_int32=True).view(-1)
