"""The linear that holds tensors in GPTQ's layout as they are on disk, whichever program wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import nn

from loftq.core.affine import scatter
from loftq.core.codebooks import CODEBOOKS
from loftq.core.grid import Grid
from loftq.core.kernels import dispatch
from loftq.core.packing import unpack
from loftq.formats import gptq
from loftq.models import packed_linear
from loftq.models.custom_ops import Operator
from loftq.models.packed_linear import PackedLinear, dequantize
from loftq.models.packed_product import Part, StoredWeight


@Operator
def _gptq_stream(qweight: torch.Tensor) -> torch.Tensor:
    """The codes of consecutive outputs as one dense stream: uint8."""
    return gptq.read_stream(qweight)


@_gptq_stream.register_fake
def _(qweight: torch.Tensor) -> torch.Tensor:
    return qweight.new_empty(qweight.numel() * 4, dtype=torch.uint8)


@Operator
def _gptq_scales(scales: torch.Tensor, qzeros: torch.Tensor, bits: int, less: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the shift of each group: float32 (groups,) each."""
    return gptq.read_scales(scales, qzeros, bits, less)


@_gptq_scales.register_fake
def _(
    scales: torch.Tensor,
    qzeros: torch.Tensor,  # noqa: ARG001
    bits: int,  # noqa: ARG001
    less: int,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    values = scales.new_empty(scales.numel(), dtype=torch.float32)
    return values, torch.empty_like(values)


@Operator
def _gptq_scattered(
    codes: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor, g_idx: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """A weight (rows, columns) in which `g_idx` (columns,) gives the group of each input.

    `codes` are a stream; scales and shifts are (rows, groups).
    """
    rows, columns = scales.shape[0], len(g_idx)
    return scatter(unpack(codes, bits, rows * columns).view(rows, columns), scales, shifts, g_idx, bits).to(dtype)


@_gptq_scattered.register_fake
def _(
    codes: torch.Tensor,  # noqa: ARG001
    scales: torch.Tensor,
    shifts: torch.Tensor,  # noqa: ARG001
    g_idx: torch.Tensor,
    bits: int,  # noqa: ARG001
    dtype: torch.dtype,
) -> torch.Tensor:
    return scales.new_empty(scales.shape[0], g_idx.shape[0], dtype=dtype)


@Operator
def _gptq_transposed(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    less: int,
    first: int,
    last: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The transposed weight of the outputs from `first` to `last`, unpacked on a GPU: (in, rows)."""
    from loftq.core.kernels.gpu_unpack import unpack_words

    out = torch.empty(len(g_idx), last - first, dtype=dtype, device=qweight.device)
    return unpack_words(qweight, qzeros, scales, g_idx, bits, less, first, out)


@_gptq_transposed.register_fake
def _(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,  # noqa: ARG001
    scales: torch.Tensor,  # noqa: ARG001
    g_idx: torch.Tensor,
    bits: int,  # noqa: ARG001
    less: int,  # noqa: ARG001
    first: int,
    last: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return qweight.new_empty(g_idx.shape[0], last - first, dtype=dtype)


@dataclass(frozen=True)
class _Gptq:
    """A weight whose codes are stored in columns. On the CPU, each part is first turned into a stream of rows."""

    name: str
    block: int
    rows: int
    columns: int
    less: int
    ordered: bool

    def parts(self, dtype: torch.dtype, *stored: torch.Tensor | None) -> Iterator[Part]:
        """Unpack the weight in parts of whole rows, each with the slice of its rows."""
        qweight, qzeros, scales, g_idx = (cast(torch.Tensor, tensor) for tensor in stored)
        bits, step = CODEBOOKS[self.name], max(packed_linear.PART // self.columns, 1)
        parts = [(first, min(first + step, self.rows)) for first in range(0, self.rows, step)]
        if dispatch.on_gpu(qweight):
            for part in parts:
                transposed = _gptq_transposed(qweight, qzeros, scales, g_idx, bits, self.less, *part, dtype)
                yield slice(*part), transposed.t()
            return
        values, shifts = _gptq_scales(scales, qzeros, bits, self.less)
        per_row = self.columns // self.block
        for first, last in parts:
            codes, blocks = _gptq_stream(qweight[:, first:last]), slice(first * per_row, last * per_row)
            scale, shift = values[blocks], shifts[blocks]
            if self.ordered:
                yield slice(first, last), dequantize(codes, scale, shift, self.name, self.block, self.columns, dtype)
            else:
                scale, shift = scale.view(-1, per_row), shift.view(-1, per_row)
                yield slice(first, last), _gptq_scattered(codes, scale, shift, g_idx, bits, dtype)


class GptqLinear(PackedLinear):
    """A frozen linear (out, in) in GPTQ's layout. `formats.gptq` defines its tensors.

    `less` is the difference between the zero-points and the numbers stored for them: 1 in version 1 of the format.
    `ordered` says whether groups consist of consecutive inputs, which is not so in act-order checkpoints.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    less = 0
    ordered = True
    _format = gptq
    _tensors = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The codes as int32 words. Code that asks for the device of the linear reads it from them."""
        return self.qweight

    def _layout(self) -> StoredWeight:
        block = self.grid.block(self.in_features)
        return _Gptq(self.grid.codebook, block, self.out_features, self.in_features, self.less, self.ordered)

    @classmethod
    def load(cls, module: str, shape: Sequence[int], grid: Grid, read: Callable[[str], torch.Tensor]) -> Self:
        """A linear (out, in) without bias, from a reader of tensors by name."""
        linear = super().load(module, shape, grid, read)
        linear.ordered = gptq.is_ordered(linear.g_idx, grid.block(shape[1]))
        return linear


def read_weight(module: str, shape: Sequence[int], grid: Grid, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The weight that the stored tensors of a linear stand for: float32 (out, in)."""
    return GptqLinear.load(module, shape, grid, read).dequantize()


def linear_classes() -> tuple[type[nn.Module], ...]:
    """The class that the plug-in puts in the place of dense linears."""
    return (GptqLinear,)
