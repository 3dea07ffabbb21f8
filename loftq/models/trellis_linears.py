"""Linears of trellis codes (`formats.trellis_streams`): built from what a solver found, and read from files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from loftq.core.grid import Grid
from loftq.core.solvers.solution import Solution
from loftq.core.trellis import FEW, TrellisCode, multiplies
from loftq.formats import trellis_streams as layout
from loftq.formats.native import stored_name
from loftq.models import packed_linear
from loftq.models.custom_ops import Operator
from loftq.models.packed_linear import PackedLinear
from loftq.models.packed_product import Part, StoredWeight


@Operator
def decode_trellis(
    codes: torch.Tensor,
    widths: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    length: int,
    first: int,
    last: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The outputs from `first` to `last` of a weight, transposed: (in, outputs) of `dtype`."""
    return TrellisCode(codes, widths, rows, columns, length).decode(slice(first, last), dtype).T


@decode_trellis.register_fake
def _(
    codes: torch.Tensor,
    widths: torch.Tensor,
    rows: torch.Tensor,  # noqa: ARG001 (of the operator's signature)
    columns: torch.Tensor,  # noqa: ARG001
    length: int,  # noqa: ARG001
    first: int,
    last: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty(widths.shape[0], last - first, dtype=dtype)


@Operator
def multiply_trellis(
    codes: torch.Tensor,
    widths: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    length: int,
    x: torch.Tensor,
    back: bool,
) -> torch.Tensor:
    """The product x Wᵀ of a few vectors, or x W if `back`, in the dtype of x."""
    return TrellisCode(codes, widths, rows, columns, length).multiply(x, back=back)


@multiply_trellis.register_fake
def _(
    codes: torch.Tensor,  # noqa: ARG001
    widths: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,  # noqa: ARG001
    length: int,  # noqa: ARG001
    x: torch.Tensor,
    back: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], (widths if back else rows).shape[0])


def _product(x: torch.Tensor, stored: Sequence[torch.Tensor], length: int, *, back: bool) -> torch.Tensor:
    codes, widths, rows, columns = stored
    product = multiply_trellis(codes, widths, rows, columns, length, x.reshape(-1, x.shape[-1]), back)
    return product.view(*x.shape[:-1], -1)


class _FewVectors(torch.autograd.Function):
    """Computes x Wᵀ for a few vectors, forward and backward without the decoded weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, length: int, *stored: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*stored)
        ctx.length = length
        return _product(x, stored, length, back=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        stored = ctx.saved_tensors
        return (_product(grad, stored, ctx.length, back=True), None, *[None] * len(stored))


@dataclass(frozen=True)
class _Streams:
    """A weight (rows, columns) as a stream for each column, whose states have `length` bits."""

    rows: int
    columns: int
    length: int

    def parts(self, dtype: torch.dtype, *stored: torch.Tensor | None) -> Iterator[Part]:
        """Decode the weight in parts of whole rows, each with the slice of its rows."""
        codes, widths, rows, columns = (cast(torch.Tensor, tensor) for tensor in stored)
        step = max(packed_linear.PART // self.columns // 8 * 8, 8)
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            yield slice(first, last), decode_trellis(codes, widths, rows, columns, self.length, first, last, dtype).T


class TrellisLinear(PackedLinear):
    """A frozen linear (out, in) whose weight is trellis codes; `formats.trellis_streams` defines its tensors."""

    _format: Any = layout
    _tensors = layout.TENSORS

    def _layout(self) -> StoredWeight:
        return _Streams(self.out_features, self.in_features, self.grid.state_bits)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if not 0 < x.numel() <= FEW * self.in_features or not multiplies(self.weight):
            return super()._multiply(x)
        product: torch.Tensor = _FewVectors.apply(x, self.grid.state_bits, *self._stored())  # type: ignore[no-untyped-call]
        return product

    def extra_repr(self) -> str:
        """The text of `nn.Linear`, followed by the type."""
        return f"{nn.Linear.extra_repr(self)}, {self.grid}"


def read_weight(module: str, shape: Sequence[int], grid: Grid, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The weight that the stored tensors of a linear or an expert stand for: float32 (out, in)."""

    def stored(name: str) -> torch.Tensor:
        return read(stored_name(module, shape, name.removeprefix(".")))

    return TrellisLinear.load("", shape[-2:], grid, stored).dequantize()


def linear_classes() -> tuple[type[nn.Module], ...]:
    """The class that the plug-in puts in the place of dense linears."""
    return (TrellisLinear,)


def build(linear: nn.Linear, grid: Grid, solution: Solution, compute_dtype: torch.dtype | None) -> TrellisLinear:
    """The linear that takes the place of a dense one."""
    return TrellisLinear.replacing(linear, grid, solution, compute_dtype)
