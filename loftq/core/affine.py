"""Quantization to integers in groups: computes scales, zero-points and codes, and decodes them.

A weight W (out, in) is read row by row as groups of `block_size` consecutive values. Codes are whole numbers of b
bits. With the level l = code − 2^(b−1), centered on zero, and the scale and shift of its group, a code is read back as

    W~ = scale · l + shift.

The kinds of zero-point, for values from lo to hi in a group:

    symmetric   scale = max|w| / (2^(b−1) − ½)            shift = 0
    integer     scale = (hi − lo) / (2^b − 1), 0 within   z = round(−lo / scale),  shift = scale · (2^(b−1) − z)
    float       scale = (hi − lo) / (2^b − 1)             shift = (lo + hi + scale) / 2, in 16 bits

At 8 bits a symmetric scale is max|w| / 127 and −128 does not occur, as in bitsandbytes' INT8 (arXiv 2208.07339).
`integer` is GPTQ's layout (arXiv 2210.17323), W~ = scale · (code − z). `float` can represent any shift of a whole
group, which is what merging a QA-LoRA adapter needs (arXiv 2309.14717, section 3.3). The shift is that of the group's
center, for which 16 bits are precise enough.

Codes are chosen under scales and shifts as they are stored. Two codes of at most 4 bits share a byte, the first in the
high half. On the CPU the loops are compiled (`kernels.affine`); elsewhere the same arithmetic runs in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from loftq.core.codebooks import INTEGERS, ZERO_POINTS, codebook
from loftq.core.kernels import affine as kernels
from loftq.core.kernels import dispatch
from loftq.core.packing import paired, single
from loftq.core.scales import Scales, stored_scales
from loftq.errors import OptionError, UnknownNameError

FLOATING = {"float": torch.float16, "float32": torch.float32}  # zero-points that float, and the dtypes of their shifts


def shifts_of(zeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The float32 shifts that belong to whole zero-points and float32 scales."""
    steps: torch.Tensor = 2 ** (bits - 1) - zeros.float()
    return scales * steps


@dataclass(frozen=True)
class AffineQuantizer:
    """Integers applied in groups of `block_size`, a multiple of 8 that divides the number of values.

    `codebook` is a name in `codebooks.INTEGERS`, `zero_point` one in `ZERO_POINTS`. Tensors are float32 and contiguous.
    """

    codebook: str
    block_size: int = 64
    zero_point: str = "integer"
    double_quant: bool = False
    scale_dtype: torch.dtype = torch.float32  # the dtype of stored scales, unless they are doubly quantized
    unit: float = 1.0  # weights were divided by it, and scales and shifts are stored times it

    def __post_init__(self) -> None:
        if self.codebook not in INTEGERS:
            raise UnknownNameError("codebook", self.codebook, INTEGERS)
        if self.zero_point not in ZERO_POINTS:
            raise UnknownNameError("zero-point", self.zero_point, ZERO_POINTS)
        if self.block_size < 8 or self.block_size % 8:
            raise OptionError(f"group size {self.block_size} is not a multiple of 8")

    def in_unit(self, unit: float) -> Self:
        """The quantizer of the weight divided by `unit`."""
        return replace(self, unit=unit)

    @property
    def bits(self) -> int:
        """Number of bits of a code."""
        return INTEGERS[self.codebook]

    @property
    def levels(self) -> torch.Tensor:
        """The values that codes stand for before scale and shift: float32 (2**bits,)."""
        return codebook(self.codebook)

    def scales(self, weight: torch.Tensor, correction: torch.Tensor | None = None) -> Scales:
        """Scales and zero-points of the groups of `weight - correction`, as they will be read back."""
        return self.covering(self.extent(weight, correction))

    def extent(self, weight: torch.Tensor, correction: torch.Tensor | None = None) -> torch.Tensor:
        """The least and the largest value in each group of `weight - correction`: float32 (2, groups)."""
        if dispatch.on_cpu(weight):
            return torch.stack(kernels.ranges(weight, correction, self.block_size))
        target = weight if correction is None else weight - correction
        return torch.stack(target.view(-1, self.block_size).aminmax(dim=1))

    def covering(self, extent: torch.Tensor, factor: torch.Tensor | float = 1.0, *, nested: bool = True) -> Scales:
        """Scales and zero-points whose grid spans `factor` of an extent.

        Scales are doubly quantized if `nested` and `double_quant`. The extent shrinks towards zero or, if zero-points
        float, towards its middle.
        """
        low, high = extent
        half = 2 ** (self.bits - 1)
        if self.zero_point == "symmetric":
            reach = 127 if self.bits == 8 else half - 0.5
            return self._stored(torch.maximum(-low, high) * factor / reach, nested)
        if self.zero_point == "integer":
            low, high = low.clamp(max=0) * factor, high.clamp(min=0) * factor
        else:
            inset = (high - low) * ((1 - factor) / 2)
            low, high = low + inset, high - inset
        scales = self._stored((high - low) / (2 * half - 1), nested)
        if self.zero_point == "integer":
            zeros = (-low / _nonzero(scales.values)).round_().clamp_(0, 2 * half - 1)
            return replace(scales, shifts=shifts_of(zeros, scales.values, self.bits), zeros=zeros.to(torch.uint8))
        return replace(scales, shifts=self._shift((low + high + scales.values).div_(2)))

    def refit(self, weight: torch.Tensor, scales: Scales) -> Scales:
        """The scales, and floating zero-points, that fit a weight best for the codes that it gets under `scales`.

        This is a least-squares fit in each group: of W = scale · l + shift if the zero-point floats, and of
        W = scale · (l − l₀) if it stays.
        """
        levels, squares, values, products = self._moments(weight, scales).double()
        count = self.block_size
        if self.zero_point in FLOATING:
            spread = count * squares - levels.square()
            slopes = (count * products - levels * values) / spread
        else:
            half = 2 ** (self.bits - 1)
            origin = torch.zeros_like(levels) if scales.zeros is None else scales.zeros.double() - half
            spread = squares - 2 * origin * levels + count * origin.square()
            slopes = (products - origin * values) / spread
        slopes = torch.where((spread > 0) & (slopes > 0), slopes, scales.values.double())
        refitted = self.fitted(slopes, None, scales)
        if self.zero_point in FLOATING:
            return replace(refitted, shifts=self._shift((values - refitted.values.double() * levels).float() / count))
        return refitted

    def fitted(self, slopes: torch.Tensor, shifts: torch.Tensor | None, before: Scales) -> Scales:
        """Fitted `slopes` as stored scales, with floating `shifts` if they are given.

        A group whose slope is not above zero keeps its scale and shift `before`. Whole zero-points stay as they are.
        """
        usable = torch.isfinite(slopes) & (slopes > 0)
        stored = self._stored(torch.where(usable, slopes, before.values).float())
        if before.zeros is not None:
            return replace(stored, shifts=shifts_of(before.zeros, stored.values, self.bits), zeros=before.zeros)
        if shifts is None:
            return stored
        return replace(stored, shifts=self._shift(torch.where(usable, shifts, before.offsets).float()))

    def _moments(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """For each group the sums of levels, their squares, values, and levels times values: float32 (4, groups)."""
        if dispatch.on_cpu(weight):
            return kernels.moments(weight, scales.values, scales.offsets, self.bits, self.block_size)
        parts = []
        for values, scale, shift in self._chunks(weight, scales):
            grouped = values.view(-1, self.block_size)
            levels = self._round(values, scale, shift)
            sums = (levels, levels.square(), grouped, levels * grouped)
            parts.append(torch.stack([each.sum(dim=1) for each in sums]))
        return torch.cat(parts, dim=1)

    def encode(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Codes under given scales: uint8 (numel,), or (numel / 2,) where two share a byte."""
        if dispatch.on_cpu(weight):
            return kernels.encode_groups(weight, scales.values, scales.offsets, self.bits, self.block_size)
        half = 2 ** (self.bits - 1)
        parts = []
        for values, scale, shift in self._chunks(weight, scales):
            codes = (self._round(values, scale, shift) + half).to(torch.uint8)
            parts.append(paired(codes.view(-1), self.bits))
        return torch.cat(parts)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, Scales]:
        """Codes and scales of a weight."""
        scales = self.scales(weight)
        return self.encode(weight, scales), scales

    def decode(self, codes: torch.Tensor, scales: Scales, shape: torch.Size) -> torch.Tensor:
        """Levels times scales plus shifts: float32 of `shape`."""
        out = torch.empty(shape, device=codes.device)
        parts = torch.split(single(codes, self.bits), self._step)
        levels = self.levels.to(codes.device)
        for (target, scale, shift), part in zip(self._chunks(out, scales), parts, strict=True):
            values = levels[part.int()].view(-1, self.block_size) * scale.unsqueeze(1) + shift.unsqueeze(1)
            target.copy_(values.view(-1))
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
        scales = scales or self.scales(weight, correction)
        if dispatch.on_cpu(weight):
            return kernels.residual(weight, correction, out, scales.values, scales.offsets, self.bits, self.block_size)
        target = weight if correction is None else weight - correction
        rounded = (
            self._round(values, scale, shift) * scale.unsqueeze(1) + shift.unsqueeze(1)
            for values, scale, shift in self._chunks(target, scales)
        )
        return dispatch.subtract(weight, rounded, self.block_size, out)

    def _shift(self, exact: torch.Tensor) -> torch.Tensor:
        """Floating shifts as they are read back: float32."""
        dtype = FLOATING[self.zero_point]
        limit = torch.finfo(dtype).max
        if self.unit != 1:
            own = (exact.double() * self.unit).clamp(-limit, limit).to(dtype)
            return (own.double() / self.unit).float()
        return exact.clamp(-limit, limit).to(dtype).float()

    def _stored(self, exact: torch.Tensor, nested: bool = True) -> Scales:
        return stored_scales(exact, self.scale_dtype, self.double_quant and nested, self.unit)

    @property
    def _step(self) -> int:
        return dispatch.step(self.block_size)

    def _chunks(self, weight: torch.Tensor, scales: Scales) -> zip[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        groups = self._step // self.block_size
        values = torch.split(weight.view(-1), self._step)
        return zip(values, torch.split(scales.values, groups), torch.split(scales.offsets, groups), strict=True)

    def _round(self, values: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """The nearest levels: float32 (groups, block_size)."""
        half = 2 ** (self.bits - 1)
        unit = (values.view(-1, self.block_size) - shift.unsqueeze(1)) * (1 / _nonzero(scale)).unsqueeze(1)
        return unit.round_().clamp_(-half, half - 1)


@dataclass(frozen=True)
class AffineWeight:
    """An unpacked weight of integers in groups of consecutive inputs, which a merge changes and an export writes.

    Codes are uint8 (out, in) from 0 to 2**bits − 1; scales and shifts are float32 (out, groups).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shifts: torch.Tensor
    bits: int

    @classmethod
    def of(cls, codes: torch.Tensor, scales: Scales, shape: Sequence[int], bits: int) -> AffineWeight:
        """Unpack codes in the solver's form, of a weight of `shape`, and their scales."""
        rows, columns = shape
        values, shifts = scales.values.view(rows, -1), scales.offsets.view(rows, -1)
        return cls(single(codes, bits).view(rows, columns), values, shifts, bits)

    @property
    def group_size(self) -> int:
        """Number of inputs that share a scale and a shift."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def biases(self) -> torch.Tensor:
        """The values of a code of 0: float32 (out, groups). The weight is code · scale + bias."""
        return torch.sub(self.shifts, self.scales, alpha=2 ** (self.bits - 1))

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (out, in), computed in `dtype`."""
        levels = self.codes.view(*self.scales.shape, self.group_size).to(dtype).sub_(2 ** (self.bits - 1))
        weight = levels * self.scales.unsqueeze(2).to(dtype) + self.shifts.unsqueeze(2).to(dtype)
        return weight.view(self.codes.shape)


def scatter(
    codes: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor, groups: torch.Tensor, bits: int
) -> torch.Tensor:
    """A weight float32 (rows, in) of codes (rows, in), with the group of each input: of scales (rows, groups)."""
    at = groups.long()
    levels: torch.Tensor = codes.float() - 2 ** (bits - 1)
    return levels * scales[:, at] + shifts[:, at]


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.abs() > 1e-38, scale, 1e-38)
