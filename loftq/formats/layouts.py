"""The layouts that a quantized linear can be written in, by name.

A layout is a module that has all of `Layout`: nobody else asks for a format by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from loftq.core.grid import ROW, Grid
from loftq.core.scales import Scales, Solved
from loftq.errors import OptionError, UnknownNameError
from loftq.formats import bitsandbytes, gptq, native
from loftq.formats.checkpoint import TensorSpec


class Layout(Protocol):
    """The interface of a format's module: the names and bytes of one linear, the entry of `config.json`, and the texts
    that a user needs to load a folder.
    """

    METHOD: str  # its name: that of --format, and `quant_method` in `config.json`
    BLOCK_SIZES: tuple[int, ...]
    SIDES: int  # both sides of a linear are multiples of it
    SCALE_DTYPE: torch.dtype
    HOLDS: str  # the types that `holds` accepts, in words
    STOCK: bool  # whether loaders that do not know loftq load it: they convert the stock classes of linears alone
    SEVERAL_TYPES: bool  # whether the linears of one folder may have several types
    WITHOUT_WEIGHT: bool  # whether its stock loader takes models of text alone, with linears that have no `weight`
    IN_MEMORY: bool  # whether a linear of it can be built in memory (`LayoutLinears.build`)
    LINEARS: str  # the module of its linears: `models.layout_linears.LayoutLinears`
    PLUGIN: str | None  # the module that registers it with transformers when it is imported
    IMPORT_LINE: str  # the line of Python before stock loading, or nothing
    PLAN_NOTE: str  # what the plan says of loading, with {what} is quantized and the {loader}, or nothing

    def holds(self, grid: Grid, /) -> bool:
        """Whether such codes have a place in the format."""

    def specs(self, module: str, shape: Sequence[int], grid: Grid, dtype: torch.dtype, /) -> list[TensorSpec]:
        """The tensors of one linear."""

    def tensors(
        self,
        module: str,
        shape: Sequence[int],
        grid: Grid,
        dtype: torch.dtype,
        codes: torch.Tensor,
        scales: Scales,
        /,
    ) -> dict[str, torch.Tensor]:
        """Their values."""

    def read(self, module: str, shape: Sequence[int], grid: Grid, tensor: Callable[[str], torch.Tensor], /) -> Solved:
        """The inverse of `tensors`, from a reader of tensors by name."""

    def input_groups(
        self, module: str, shape: Sequence[int], grid: Grid, tensor: Callable[[str], torch.Tensor], /
    ) -> torch.Tensor | None:
        """The group of each input where groups are not of consecutive inputs, and None where they are."""

    def load_options(self, recipe: Mapping[str, Any], /) -> str:
        """The `quantization_config` that stock `from_pretrained` gets, as Python, or nothing."""

    def card_note(self, grid: Grid, /) -> str:
        """An item of a list: what somebody who loads such weights should know."""

    def quantization_config(
        self,
        grid: Grid,
        compute_dtype: torch.dtype,
        skip_modules: Sequence[str],
        codebooks: Mapping[str, str],
        target_modules: Sequence[str],
        /,
    ) -> dict[str, object]:
        """The entry of `config.json`."""


_ALL: tuple[Layout, ...] = (bitsandbytes, gptq, native)  # the first that holds a type is its default
LAYOUTS: Mapping[str, Layout] = {layout.METHOD: layout for layout in _ALL}
OURS = native.METHOD  # which holds everything, for all linears


def choose(
    grids: Sequence[Grid],
    wanted: str | None,
    *,
    shapes: Collection[tuple[int, int]] = (),
    loadable: Collection[str] = tuple(LAYOUTS),
) -> str:
    """The name of the layout: the one wanted, or else the first that holds such codes.

    `grids` are those that layers may have, and `loadable` the layouts in which a loader takes the model's linears.
    Raises OptionError where the layout cannot hold them, with those that can.
    """
    if wanted is None:
        wanted = next(name for name in LAYOUTS if name in loadable and _fits(name, grids, shapes))
    if wanted not in LAYOUTS:
        raise UnknownNameError("format", wanted, LAYOUTS)
    if wanted not in loadable:
        raise OptionError(f"--format {wanted}: its loaders cannot load this model's linears: use --format {OURS}")
    layout = LAYOUTS[wanted]
    for grid in grids:
        if not layout.holds(grid):
            others = " or ".join(name for name in LAYOUTS if name in loadable and LAYOUTS[name].holds(grid))
            raise OptionError(f"--format {wanted} holds {layout.HOLDS}, not {grid}: use --format {others}")
        if grid.block_size not in layout.BLOCK_SIZES:
            known = [size for size in layout.BLOCK_SIZES if layout.holds(replace(grid, block_size=size))]
            sizes = ", ".join(map(str, known))
            raise OptionError(f"{grid.sharing} {grid.block_size} is not one that {wanted} has (known: {sizes})")
    if len(grids) > 1 and not layout.SEVERAL_TYPES:
        raise OptionError(f"--format {wanted} holds one width a folder: use --format {OURS} for {grids[0]} and others")
    return wanted


def _fits(name: str, grids: Sequence[Grid], shapes: Collection[tuple[int, int]]) -> bool:
    layout = LAYOUTS[name]
    sides = all(side % layout.SIDES == 0 for shape in shapes for side in shape)
    return name == OURS or ((len(grids) == 1 or layout.SEVERAL_TYPES) and all(map(layout.holds, grids)) and sides)


def misfit(name: str, grid: Grid, rows: int, columns: int) -> str | None:
    """Why a layout cannot hold a linear of these sides, and what could be used instead."""
    layout, block = LAYOUTS[name], grid.block(columns)
    if rows % layout.SIDES or columns % layout.SIDES:
        return f"--format {name} packs {layout.SIDES} weights a word along both sides: use --format {OURS}"
    if columns % block == 0:  # blocks across rows are legal, but bitsandbytes reads them wrongly on the CPU
        return f"its {columns} inputs are no multiple of 8" if block % 8 else None
    option = f"--{grid.sharing.replace(' ', '-')}"
    fitting = [size for size in layout.BLOCK_SIZES if size != ROW and columns % size == 0]
    advice = f": use {option} {fitting[-1]}" if fitting else ""
    return f"{option} {block} does not divide its {columns} inputs{advice}"
