"""The linear that holds packed codes, and its LoRA layer.

Only the codes and their scales live: a forward pass unpacks the weight, multiplies, and forgets it, and the
backward pass unpacks it again. Large weights are unpacked in parts, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from loftq.core import kernels
from loftq.core.codebooks import CODEBOOKS, codebook
from loftq.core.packing import unpack
from loftq.formats.native import read_scales, tensor_shapes

_PART = 1 << 24  # weights unpacked at a time
Part = tuple[slice, torch.Tensor]


@cache
def _table(name: str, device: torch.device) -> torch.Tensor:
    """For every value of a byte, or of 12 bits where codes have 3, the levels of the codes in it: float32."""
    bits = CODEBOOKS[name]
    count = 4 if bits == 3 else 8 // bits
    values = torch.arange(1 << (count * bits))
    digits = [(values >> (bits * i)) & ((1 << bits) - 1) for i in range(count)]
    return torch.stack([codebook(name)[digit] for digit in digits], dim=1).contiguous().to(device)


@torch.library.custom_op("loftq::dequantize", mutates_args=())
def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, name: str, block: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Levels times scales: (rows, columns) of `dtype`, from a stream of codes and float32 scales (blocks,)."""
    rows = len(scales) * block // columns
    if packed.device.type == "cpu":
        kept = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
        out = torch.empty(rows, columns, dtype=kept)
        return kernels.dequantize(packed, scales, _table(name, packed.device), block, out).to(dtype)
    return _dequantize_in_torch(packed, scales, name, block).to(dtype).view(rows, columns)


def _dequantize_in_torch(packed: torch.Tensor, scales: torch.Tensor, name: str, block: int) -> torch.Tensor:
    """The same by torch's own operators, for every device: float32 (blocks, block)."""
    if CODEBOOKS[name] == 3:
        levels = codebook(name).to(packed.device)[unpack(packed, 3, len(scales) * block).int()]
    else:
        levels = _table(name, packed.device)[packed.int()]
    return levels.view(-1, block) * scales.unsqueeze(1)


@dequantize.register_fake
def _(
    packed: torch.Tensor,
    scales: torch.Tensor,
    name: str,  # noqa: ARG001 (of the operator's signature)
    block: int,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return packed.new_empty(scales.shape[0] * block // columns, columns, dtype=dtype)


@torch.library.custom_op("loftq::decode_scales", mutates_args=())
def _decode_scales(codes: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Doubly quantized scales: float32 (blocks,)."""
    return read_scales(codes, absmax, offset)


@_decode_scales.register_fake
def _(codes: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return codes.new_empty(codes.shape, dtype=torch.float32)


def _scales(
    stored: torch.Tensor, absmax: torch.Tensor | None = None, offset: torch.Tensor | None = None
) -> torch.Tensor:
    if absmax is None or offset is None:
        return stored.float()
    found: torch.Tensor = _decode_scales(stored, absmax, offset)
    return found


@dataclass(frozen=True)
class _Layout:
    """How the codes of a weight (rows, columns) lie in their stream."""

    name: str
    block: int
    rows: int
    columns: int

    def parts(self, packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> Iterator[Part]:
        """The weight in parts of whole rows, with the rows that each holds."""
        bits = CODEBOOKS[self.name]
        step = max(_PART // self.columns // 8 * 8, 8)  # so that parts begin at whole bytes
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            begin, end = first * self.columns, last * self.columns
            codes, blocks = packed[begin * bits // 8 : end * bits // 8], scales[begin // self.block : end // self.block]
            yield slice(first, last), dequantize(codes, blocks, self.name, self.block, self.columns, dtype)


class _Matmul(torch.autograd.Function):
    """x Wᵀ with W unpacked on the way forward and again on the way back: autograd keeps what is stored, no more."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layout: _Layout,
        packed: torch.Tensor,
        scales: torch.Tensor,
        *nested: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.layout = layout
        ctx.save_for_backward(packed, scales, *nested)
        products = [x @ weight.T for _, weight in layout.parts(packed, _scales(scales, *nested), x.dtype)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        packed, *scales = ctx.saved_tensors
        parts = ctx.layout.parts(packed, _scales(*scales), grad.dtype)
        rows, weight = next(parts)
        total = grad[..., rows] @ weight
        for rows, weight in parts:
            total += grad[..., rows] @ weight
        return (total, *[None] * (2 + len(scales)))


class PackedLinear(nn.Linear):
    """A frozen linear (out, in) whose weight is packed codes; `formats.native` defines its tensors.

    `weight` is uint8 and one-dimensional: code that expects a dense weight fails rather than compute nonsense.
    """

    weight_scales: torch.Tensor
    weight_scales_absmax: torch.Tensor | None
    weight_scales_offset: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        codebook: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.codebook, self.block_size, self.double_quant = codebook, block_size, double_quant
        self.compute_dtype = dtype or torch.get_default_dtype()
        shapes = tensor_shapes((out_features, in_features), CODEBOOKS[codebook], block_size, double_quant)
        stored = {name: torch.zeros(size, dtype=kind, device=device) for name, (kind, size) in shapes.items()}
        self.weight = nn.Parameter(stored.pop("weight"), requires_grad=False)
        for name in ("weight_scales", "weight_scales_absmax", "weight_scales_offset"):
            self.register_buffer(name, stored.get(name))
        kept = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), False) if bias else None
        self.register_parameter("bias", kept)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x Wᵀ + b in the input's dtype, or autocast's."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        layout = _Layout(self.codebook, self.block_size, self.out_features, self.in_features)
        out: torch.Tensor = _Matmul.apply(input.to(dtype), layout, self.weight, *self._stored_scales())  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(dtype)

    def _stored_scales(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return self.weight_scales, self.weight_scales_absmax, self.weight_scales_offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the codes stand for: (out, in)."""
        scales = _scales(*self._stored_scales())
        found: torch.Tensor = dequantize(self.weight, scales, self.codebook, self.block_size, self.in_features, dtype)
        return found

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary linear of the same values, in the compute dtype unless another is given."""
        dtype = dtype or self.compute_dtype
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, dtype=dtype)
        dense.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        dense.bias = self.bias
        return dense

    def reset_parameters(self) -> None:
        """Nothing: codes are loaded, never drawn."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Codes and scales follow to another device, but never change their dtype: float16 scales cast to
        # bfloat16 would be other scales.
        kept = {name: buffer.dtype for name, buffer in self.named_buffers(recurse=False)}
        before = {name: getattr(self, name) for name in kept}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in kept.items():
            moved = getattr(self, name)
            if moved.dtype != dtype:
                setattr(self, name, before[name].to(moved.device))
        return self

    def extra_repr(self) -> str:
        """As `nn.Linear`, with the codebook."""
        return f"{super().extra_repr()}, codebook={self.codebook}, block_size={self.block_size}"
