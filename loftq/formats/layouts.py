"""The layouts that a quantized linear can be written in, by name: what each holds is its own `check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from loftq.core.blockwise import BlockQuantizer, Scales
from loftq.errors import OptionError, UnknownNameError
from loftq.formats import bitsandbytes, native
from loftq.formats.checkpoint import TensorSpec


class Layout(Protocol):
    """What a format's module offers: names and bytes of one linear, and the entry of `config.json`."""

    BLOCK_SIZES: tuple[int, ...]
    SCALE_DTYPE: torch.dtype

    def check(self, codebook: str, block_size: int, /) -> None:
        """Raise OptionError where the format cannot hold such codes."""

    def specs(
        self, module: str, shape: Sequence[int], quantizer: BlockQuantizer, dtype: torch.dtype, /
    ) -> list[TensorSpec]:
        """The tensors of one linear."""

    def tensors(
        self,
        module: str,
        shape: Sequence[int],
        quantizer: BlockQuantizer,
        dtype: torch.dtype,
        codes: torch.Tensor,
        scales: Scales,
        /,
    ) -> dict[str, torch.Tensor]:
        """Their values."""

    def quantization_config(
        self,
        quantizer: BlockQuantizer,
        compute_dtype: torch.dtype,
        skip_modules: Sequence[str],
        codebooks: Mapping[str, str],
        /,
    ) -> dict[str, object]:
        """The entry of `config.json`."""


LAYOUTS: Mapping[str, Layout] = {"bitsandbytes": bitsandbytes, "loftq": native}


def choose(codebook: str, block_size: int, wanted: str | None, *, stock: bool = True) -> str:
    """The name of the layout: the one wanted, or else bitsandbytes where it holds such codes and stock loaders can
    load the model's linears, or else our own. Raises OptionError where the layout cannot hold them.
    """
    if wanted is not None and wanted not in LAYOUTS:
        raise UnknownNameError("format", wanted, LAYOUTS)
    if wanted == "bitsandbytes" and not stock:
        raise OptionError("--format bitsandbytes: stock transformers cannot load this model's linears: use loftq")
    name = wanted or ("bitsandbytes" if stock and codebook in bitsandbytes.CODEBOOKS else "loftq")
    LAYOUTS[name].check(codebook, block_size)
    return name
