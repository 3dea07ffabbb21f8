"""What a run was asked to do: every setting, with its default and its bounds."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from loftq.core.blockwise import BlockQuantizer
from loftq.core.solver import SVD
from loftq.errors import OptionError, UnknownNameError
from loftq.formats import layouts
from loftq.formats.adapter import scaling
from loftq.formats.layouts import Layout

BITS = {2: "nf2", 3: "nf3", 4: "nf4"}  # width to codebook
ALLOCATIONS = {
    "first": "4 bits for the first layers, 2 for the rest, as in the paper",
    "auto": "the widths with which the summed error is least",
}
COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def layer_seed(seed: int, module: str) -> int:
    """The seed of one layer: its own, whatever the order in which layers are solved."""
    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Recipe:
    """The settings that decide the result. The same recipe on the same source gives the same bytes."""

    bits: float = 4
    allocation: str | None = None
    rank: int = 16
    iters: int = 5
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    double_quant: bool = False
    block_size: int = 64
    format: str | None = None
    compute_dtype: str = "bfloat16"
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = ()
    task: str | None = None
    num_labels: int | None = None
    svd: str = "krylov"
    seed: int = 0
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        self._resolve_bits()
        if self.rank < 1:
            raise OptionError(f"--rank {self.rank}: expected 1 or more")
        if not 0 <= self.iters <= 100:
            raise OptionError(f"--iter {self.iters}: expected 0 (QLoRA's start) to 100")
        if not 0 < self.lora_alpha <= 1e6:
            raise OptionError(f"--alpha {self.alpha}: expected a number above 0, at most 1000000 (default: the rank)")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"--dropout {self.dropout}: expected 0 or more, below 1")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"--seed {self.seed}: expected 0 to 2**63 - 1")
        if self.num_labels is not None and not 1 <= self.num_labels <= 1_000_000:
            raise OptionError(f"--num-labels {self.num_labels}: expected 1 or more")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise UnknownNameError("compute dtype", self.compute_dtype, COMPUTE_DTYPES)
        if self.svd not in SVD:
            raise UnknownNameError("svd", self.svd, SVD)
        for width in self.widths:
            layouts.choose(BITS[width], self.block_size, self.format)

    def _resolve_bits(self) -> None:
        """A whole number as an int, and an allocation for what is none."""
        if float(self.bits).is_integer():
            object.__setattr__(self, "bits", int(self.bits))
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise UnknownNameError("allocation", self.allocation, ALLOCATIONS)
        known = f"known: {', '.join(map(str, BITS))}, and budgets between"
        if not min(BITS) <= self.bits <= max(BITS):
            raise OptionError(f"--bits {self.bits}: no type has that width ({known})")
        if self.bits not in BITS and self.allocation is None:
            object.__setattr__(self, "allocation", "auto")

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that layers may get, the narrowest first."""
        if self.allocation is None:
            return (int(self.bits),)
        return (min(BITS), max(BITS)) if self.allocation == "first" else tuple(sorted(BITS))

    @property
    def lora_alpha(self) -> float:
        """Alpha, which defaults to the rank: a scaling of one."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scaling(self) -> float:
        """The factor before B·A with which the adapter will run."""
        return scaling(self.lora_alpha, self.rank, self.rslora)

    def quantizer(self, layout: Layout, width: int) -> BlockQuantizer:
        """What rounds a layer to a width, with scales as the layout stores them."""
        return BlockQuantizer(BITS[width], self.block_size, self.double_quant, layout.SCALE_DTYPE)

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes, and in which what is not quantized is stored."""
        return COMPUTE_DTYPES[self.compute_dtype]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, alpha resolved."""
        return {**dataclasses.asdict(self), "alpha": self.lora_alpha}
