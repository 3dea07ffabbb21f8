"""The 4-bit layout of bitsandbytes whose codes are stored as bfloat16 numbers, for training under FSDP.

FSDP shards floating-point tensors alone. The bytes are those of `formats.bitsandbytes`, two of them a number:

    weight    bfloat16 (n / 4, 1)

bitsandbytes takes the storage from the tensors; transformers compares it with `bnb_4bit_quant_storage`. Servers read
only uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from loftq.core.codebooks import ROW
from loftq.core.grid import Grid
from loftq.core.scales import Scales, Solved
from loftq.formats import bitsandbytes
from loftq.formats.bitsandbytes import input_groups as input_groups
from loftq.formats.checkpoint import TensorSpec

METHOD = bitsandbytes.METHOD
BLOCK_SIZES = tuple(size for size in bitsandbytes.BLOCK_SIZES if size != ROW)
SIDES = bitsandbytes.SIDES
SCALE_DTYPE = bitsandbytes.SCALE_DTYPE
HOLDS = "nf4 in blocks"
STOCK = True
EXPERTS = False
SEVERAL_TYPES = False
WITHOUT_WEIGHT = False
IN_MEMORY = False
LINEARS = bitsandbytes.LINEARS
PLUGIN: str | None = None
IMPORT_LINE = ""
PLAN_NOTE = "{what} is stored for training under FSDP; servers do not read it"
_STORAGE = torch.bfloat16
_BYTES = 2  # in a number of this storage


def holds(grid: Grid) -> bool:
    """Whether this format can hold codes of this type."""
    return grid.bits == 4 and bitsandbytes.holds(grid)


def specs(module: str, shape: Sequence[int], grid: Grid, dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of one linear, in the order in which `tensors` gives them."""
    weight, *others = bitsandbytes.specs(module, shape, grid, dtype)
    return [replace(weight, dtype=_STORAGE, shape=(weight.shape[0] // _BYTES, 1)), *others]


def tensors(
    module: str, shape: Sequence[int], grid: Grid, dtype: torch.dtype, codes: torch.Tensor, scales: Scales
) -> dict[str, torch.Tensor]:
    """The named tensors of one linear from its codes, as the solver leaves them, and scales."""
    found = bitsandbytes.tensors(module, shape, grid, dtype, codes, scales)
    name = f"{module}.weight"
    return {**found, name: found[name].contiguous().view(-1).view(_STORAGE).view(-1, 1)}


def read(module: str, shape: Sequence[int], grid: Grid, tensor: Callable[[str], torch.Tensor]) -> Solved:
    """The inverse of `tensors`: codes as the solver leaves them, and scales."""

    def stored(name: str) -> torch.Tensor:
        found = tensor(name)
        return found.view(-1).view(torch.uint8).view(-1, 1) if name == f"{module}.weight" else found

    return bitsandbytes.read(module, shape, grid, stored)


def load_options(recipe: Mapping[str, Any]) -> str:
    """The `quantization_config` that `from_pretrained` gets, as Python."""
    own = bitsandbytes.load_options(recipe)
    return own.removesuffix("    )") + "        bnb_4bit_quant_storage=torch.bfloat16,\n    )"


def card_note(grid: Grid) -> str:
    """The note in the card on loading the folder."""
    return (
        "- The codes are stored as bfloat16 numbers, so that FSDP can shard them. Servers read uint8 alone.\n"
        + bitsandbytes.card_note(grid)
    )


def quantization_config(
    grid: Grid,
    compute_dtype: torch.dtype,
    skip_modules: Sequence[str],
    codebooks: Mapping[str, str] | None = None,
    target_modules: Sequence[str] = (),
    target_parameters: Sequence[str] = (),
) -> dict[str, object]:
    """The entry of `config.json`. `skip_modules` replaces the library's defaults: it must list the head."""
    own = bitsandbytes.quantization_config(
        grid, compute_dtype, skip_modules, codebooks, target_modules, target_parameters
    )
    return {**own, "bnb_4bit_quant_storage": str(_STORAGE).removeprefix("torch.")}
