"""The type of a quantized weight, and the quantizer that rounds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from loftq.core.codebooks import CODEBOOKS, type_of
from loftq.core.codebooks import ROW as ROW

if TYPE_CHECKING:
    import torch

    from loftq.core.scales import Scales


class Decoder(Protocol):
    """The interface of a type for a reader of codes."""

    @property
    def levels(self) -> torch.Tensor:
        """The values that codes stand for before scale and shift: float32, ascending; (2**bits,), or only the ends."""

    def decode(self, codes: torch.Tensor, scales: Scales, shape: torch.Size) -> torch.Tensor:
        """The values that codes stand for: float32 of `shape`."""


class Quantizer(Decoder, Protocol):
    """The interface of a type for the solver. Tensors are float32 and contiguous."""

    @property
    def block_size(self) -> int:
        """Weights that share a scale."""

    def in_unit(self, unit: float) -> Self:
        """The quantizer of the weight divided by `unit`, a power of two."""

    def scales(self, weight: torch.Tensor, correction: torch.Tensor | None = None) -> Scales:
        """Scales of `weight - correction`, as they will be read back."""

    def extent(self, weight: torch.Tensor, correction: torch.Tensor | None = None) -> torch.Tensor:
        """The range that the scales of `weight - correction` must cover: float32 (blocks,) or (2, blocks)."""

    def covering(self, extent: torch.Tensor, factor: torch.Tensor | float = 1.0, *, nested: bool = True) -> Scales:
        """Scales for `factor`, one or (blocks,), of an extent; never doubly quantized unless `nested`."""

    def encode(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Codes under given scales: uint8; of 4 bits or less two a byte, the first in the high half."""

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, Scales]:
        """Codes and scales of a weight."""

    def residual(
        self, weight: torch.Tensor, correction: torch.Tensor | None, out: torch.Tensor, scales: Scales | None = None
    ) -> float:
        """`out = W − decode(encode(W − correction))`, and its squared norm. `out` may be `correction`."""


@dataclass(frozen=True)
class Grid:
    """A type of quantized weight: levels, how many weights share a scale, and where zero lies.

    `codebook` is a name of `codebooks.CODEBOOKS`; `block_size` counts consecutive inputs, or is ROW; `zero_point`, of
    `codebooks.ZERO_POINTS`, is for integers alone.
    """

    codebook: str = "nf4"
    block_size: int = 64
    double_quant: bool = False
    zero_point: str | None = None

    @property
    def bits(self) -> Any:
        """Number of bits of a code: an int, or for a trellis code the mean of the columns."""
        return CODEBOOKS[self.codebook]

    @property
    def trellis(self) -> bool:
        """Whether codes are paths through a trellis, which have a width of their own in each column."""
        return type_of(self.codebook).trellis

    @property
    def state_bits(self) -> int:
        """Number of bits of a state of a trellis code."""
        return type_of(self.codebook).state_bits

    @property
    def integer(self) -> bool:
        """Whether codes are whole numbers, which zero-points belong to."""
        return type_of(self.codebook).integer

    @property
    def sharing(self) -> str:
        """The usual name of the number of weights that share a scale."""
        return type_of(self.codebook).sharing

    def __str__(self) -> str:
        kind = f" with {self.zero_point} zero-points" if self.zero_point else ""
        return f"{self.codebook}{kind}" + (", doubly quantized" if self.double_quant else "")

    def block(self, columns: int) -> int:
        """Weights that share a scale, in rows of `columns`."""
        return columns if self.block_size == ROW else self.block_size

    def decoder(self, columns: int, scale_dtype: torch.dtype | None = None) -> Decoder:
        """The decoder of weights with rows of `columns`; the quantizer, if the type is not a trellis code."""
        if not self.trellis:
            return self.quantizer(columns, scale_dtype)
        from loftq.core.trellis import TrellisQuantizer

        return TrellisQuantizer(self.bits, self.state_bits)

    def quantizer(self, columns: int, scale_dtype: torch.dtype | None = None) -> Quantizer:
        """The quantizer of weights with rows of `columns`, unless the type is a trellis code.

        Its scales have `scale_dtype`, float32 by default. torch is imported here, since a type alone needs none of it.
        """
        import torch

        from loftq.core.affine import AffineQuantizer
        from loftq.core.blockwise import BlockQuantizer

        block, dtype = self.block(columns), scale_dtype or torch.float32
        if self.integer:
            return AffineQuantizer(self.codebook, block, self.zero_point or "symmetric", self.double_quant, dtype)
        return BlockQuantizer(self.codebook, block, self.double_quant, dtype)
