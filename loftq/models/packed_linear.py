"""The linear that holds packed codes in our own layout, which is also the base class for other layouts.

Only the codes and their scales stay in memory: a forward pass unpacks the weight, multiplies, and discards it, and the
backward pass unpacks it again. Large weights are unpacked in parts, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self, cast

import torch
from torch import nn

from loftq.core.codebooks import CODEBOOKS, codebook
from loftq.core.grid import Grid
from loftq.core.kernels import blocks, dispatch
from loftq.core.packing import unpack
from loftq.core.solvers.solution import Solution
from loftq.formats import native
from loftq.models.custom_ops import Operator
from loftq.models.packed_product import Part, StoredWeight, product_with

PART = 1 << 24  # number of weights that are unpacked at a time


@cache
def _levels(name: str, device: torch.device) -> torch.Tensor:
    return codebook(name).to(device)


def _codes_of_a_table(name: str) -> int | None:
    """How many codes a row of `_table` holds: those of a byte, or of 12 bits where codes of 3 straddle bytes.

    None where there is no table for the width.
    """
    bits = CODEBOOKS[name]
    return 8 // bits if 8 % bits == 0 else {3: 4}.get(bits)


@cache
def _table(name: str, device: torch.device) -> torch.Tensor:
    """For every value of a byte, or of 12 bits for codes of 3 bits, the levels of the codes in it: float32."""
    bits, count = CODEBOOKS[name], _codes_of_a_table(name) or 1
    values = torch.arange(1 << (count * bits))
    digits = [(values >> (bits * i)) & ((1 << bits) - 1) for i in range(count)]
    return torch.stack([codebook(name)[digit] for digit in digits], dim=1).contiguous().to(device)


@Operator
def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shifts: torch.Tensor | None,
    name: str,
    block: int,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute levels times scales plus shifts: (rows, columns) of `dtype`.

    `packed` is a stream of codes of the codebook `name`; scales and shifts are (blocks,).
    """
    shape, device = (len(scales) * block // columns, columns), packed.device
    if dispatch.on_gpu(packed):
        from loftq.core.kernels.gpu_unpack import unpack_stream

        out = torch.empty(shape, dtype=dtype, device=device)
        return unpack_stream(packed, scales, shifts, _levels(name, device), block, out)
    scales, shifts = scales.float(), None if shifts is None else shifts.float()
    if dispatch.on_cpu(packed) and _codes_of_a_table(name):
        out = torch.empty(shape, dtype=dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32)
        return blocks.dequantize_blocks(packed, scales, shifts, _table(name, device), block, out).to(dtype)
    bits = CODEBOOKS[name]
    if 8 % bits == 0:
        levels = _table(name, device)[packed.int()]
    else:
        levels = _levels(name, device)[unpack(packed, bits, len(scales) * block).int()]
    values = levels.view(-1, block) * scales.unsqueeze(1)
    values = values if shifts is None else values + shifts.unsqueeze(1)
    return values.to(dtype).view(shape)


@dequantize.register_fake
def _(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shifts: torch.Tensor | None,  # noqa: ARG001 (of the operator's signature)
    name: str,  # noqa: ARG001
    block: int,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return packed.new_empty(scales.shape[0] * block // columns, columns, dtype=dtype)


@Operator
def _decode_scales(codes: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The values of doubly quantized scales: float32 (blocks,)."""
    return native.read_scales(codes, absmax, offset)


@_decode_scales.register_fake
def _(codes: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return codes.new_empty(codes.shape, dtype=torch.float32)


@Operator
def _decode_zeros(zeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The shifts of packed zero-points: float32 (blocks,)."""
    return native.read_zeros(zeros, scales, bits)


@_decode_zeros.register_fake
def _(zeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(scales)


def read_shifted_scales(
    bits: int,
    scales: torch.Tensor | None,
    absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    zeros: torch.Tensor | None,
    shifts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scales of a weight's blocks and what is added to its levels, if anything, from the stored tensors."""
    values = cast(torch.Tensor, scales)
    if absmax is not None:
        values = _decode_scales(values, absmax, cast(torch.Tensor, offset))
    return values, shifts if zeros is None else _decode_zeros(zeros, values.float(), bits)


@dataclass(frozen=True)
class _Native:
    """A weight as one row-major stream of codes and one scale for each block."""

    name: str
    block: int
    rows: int
    columns: int

    def parts(self, dtype: torch.dtype, *stored: torch.Tensor | None) -> Iterator[Part]:
        """Unpack the weight in parts of whole rows, each with the slice of its rows."""
        bits, per_row = CODEBOOKS[self.name], self.columns // self.block
        packed = cast(torch.Tensor, stored[0])
        values, shifts = read_shifted_scales(bits, *stored[1:])
        step = max(PART // self.columns // 8 * 8, 8)  # so that parts begin at whole bytes
        if step >= self.rows:
            whole = dequantize(packed, values, shifts, self.name, self.block, self.columns, dtype)
            yield slice(0, self.rows), whole
            return
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            codes = packed[first * self.columns * bits // 8 : last * self.columns * bits // 8]
            blocks = slice(first * per_row, last * per_row)
            shift = None if shifts is None else shifts[blocks]
            yield (
                slice(first, last),
                dequantize(codes, values[blocks], shift, self.name, self.block, self.columns, dtype),
            )


def stored_native(grid: Grid, rows: int, columns: int) -> StoredWeight:
    """The layout of a weight (rows, columns) in our own format."""
    return _Native(grid.codebook, grid.block(columns), rows, columns)


class PackedLinear(nn.Linear):
    """A frozen linear (out, in) whose weight is packed codes; `formats.native` defines its tensors.

    `weight` is uint8 and one-dimensional, so that code that expects a dense weight fails instead of using wrong values.
    """

    _format: Any = native
    _tensors: tuple[str, ...] = (
        "weight",
        "weight_scales",
        "weight_scales_absmax",
        "weight_scales_offset",
        "weight_zeros",
        "weight_shifts",
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        grid: Grid,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.grid = grid
        self.compute_dtype = dtype or torch.get_default_dtype()
        shapes = self._format.tensor_shapes((out_features, in_features), grid)
        stored = {name: torch.zeros(size, dtype=kind, device=device) for name, (kind, size) in shapes.items()}
        codes, *others = self._tensors
        self.register_parameter(codes, nn.Parameter(stored[codes], requires_grad=False))
        for name in others:
            self.register_buffer(name, stored.get(name))
        zeros = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), False) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def load(cls, module: str, shape: Sequence[int], grid: Grid, read: Callable[[str], torch.Tensor]) -> Self:
        """A linear (out, in) without bias, from a reader of tensors by name."""
        linear = cls(shape[1], shape[0], False, grid=grid)
        linear.load_state_dict({name: read(f"{module}.{name}") for name in linear.state_dict()})
        return linear

    @classmethod
    def replacing(cls, linear: nn.Linear, grid: Grid, solution: Solution, compute_dtype: torch.dtype | None) -> Self:
        """The linear that takes the place of a dense one, with the codes of a solution."""
        dtype, shape = compute_dtype or linear.weight.dtype, tuple(linear.weight.shape)
        packed = cls(shape[1], shape[0], linear.bias is not None, grid=grid, dtype=dtype, device=linear.weight.device)
        stored = cls._format.tensors("", shape, grid, linear.weight.dtype, solution.codes, solution.scales)
        for name, tensor in stored.items():
            getattr(packed, name.lstrip(".")).data.copy_(tensor)
        packed.bias = linear.bias
        return packed.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute y = x Wᵀ + b in the input's dtype, or in that of autocast."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        out = self._multiply(input.to(dtype))
        return out if self.bias is None else out + self.bias.to(dtype)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return product_with(self._layout(), x, *self._stored())

    def _layout(self) -> StoredWeight:
        return stored_native(self.grid, self.out_features, self.in_features)

    def _stored(self) -> list[torch.Tensor | None]:
        return [getattr(self, name) for name in self._tensors]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (out, in) as a dense tensor."""
        parts = [part for _, part in self._layout().parts(dtype, *self._stored())]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary linear with the same values, by default in the compute dtype."""
        dtype = dtype or self.compute_dtype
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, dtype=dtype)
        dense.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        dense.bias = self.bias
        return dense

    def reset_parameters(self) -> None:
        """Do nothing: codes are loaded and never initialized at random."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Codes and scales move to another device, but never change their dtype: float16 scales would lose precision
        # in bfloat16.
        dtypes = {name: buffer.dtype for name, buffer in self.named_buffers(recurse=False)}
        before = {name: getattr(self, name) for name in dtypes}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in dtypes.items():
            moved = getattr(self, name)
            if moved.dtype != dtype:
                setattr(self, name, before[name].to(moved.device))
        return self

    def extra_repr(self) -> str:
        """The text of `nn.Linear`, followed by the codebook and the block size."""
        return f"{super().extra_repr()}, {self.grid}, {self.grid.sharing} {self.grid.block(self.in_features)}"
