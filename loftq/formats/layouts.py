"""The on-disk layouts of a quantized linear, by name.

A layout is a module that implements `Layout`. No other code depends on the name of a format.

A `shape` is that of a linear, (out, in), or (experts, out, in) for a stack of fused experts, which only layouts with
EXPERTS hold. The tensors of a stack are those of its experts, one after the other along a new first dimension, and
their names begin with the name of the parameter in place of `MODULE.weight`. `tensors` and `read` then take one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from loftq.core.codebooks import ROW
from loftq.errors import OptionError, UnknownNameError
from loftq.tables import LazyTable

if TYPE_CHECKING:
    import torch

    from loftq.core.grid import Grid
    from loftq.core.scales import Scales, Solved
    from loftq.formats.checkpoint import TensorSpec


class Layout(Protocol):
    """The interface of a format's module: the names and bytes of one linear, the entry of `config.json`, and the texts
    that a user needs to load a folder.
    """

    METHOD: str  # `quant_method` in `config.json`
    BLOCK_SIZES: tuple[int, ...]
    SIDES: int  # both sides of a linear must be multiples of this number
    SCALE_DTYPE: torch.dtype
    HOLDS: str  # the types that `holds` accepts, in words
    STOCK: bool  # whether loaders without loftq can load it; they convert only the stock classes of linears
    EXPERTS: bool  # whether it holds fused experts
    SEVERAL_TYPES: bool  # whether the linears of one folder may have several types
    WITHOUT_WEIGHT: bool  # whether its stock loader needs a model of text only, and gives it linears without `weight`
    IN_MEMORY: bool  # whether its linear can be built in memory (`LayoutLinears.build`)
    LINEARS: str  # the module of its linears: `models.layout_linears.LayoutLinears`
    PLUGIN: str | None  # the module that registers it with transformers when it is imported
    IMPORT_LINE: str  # the line of Python that stock loading needs first; or empty
    PLAN_NOTE: str  # a note on loading for the plan, with places for {what} is quantized and for the {loader}; or empty

    def holds(self, grid: Grid, /) -> bool:
        """Whether the format can hold codes of this type."""

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
        """The values of these tensors."""

    def read(self, module: str, shape: Sequence[int], grid: Grid, tensor: Callable[[str], torch.Tensor], /) -> Solved:
        """The inverse of `tensors`, from a reader of tensors by name."""

    def input_groups(
        self, module: str, shape: Sequence[int], grid: Grid, tensor: Callable[[str], torch.Tensor], /
    ) -> torch.Tensor | None:
        """The group of each input, or None if groups consist of consecutive inputs."""

    def load_options(self, recipe: Mapping[str, Any], /) -> str:
        """The `quantization_config` argument of stock `from_pretrained`, as Python code; or empty."""

    def card_note(self, grid: Grid, /) -> str:
        """An item of a list in the card: the facts that a user needs to load such weights."""

    def quantization_config(
        self,
        grid: Grid,
        compute_dtype: torch.dtype,
        skip_modules: Sequence[str],
        codebooks: Mapping[str, str],
        target_modules: Sequence[str],
        target_parameters: Sequence[str] = (),
        /,
    ) -> dict[str, object]:
        """The entry of `config.json`. `target_parameters` are the ends of names of the stacks that are quantized."""


OURS = "loftq"  # it can hold every type and every linear
LAYOUTS: Mapping[str, Layout] = LazyTable(  # the first that holds a type is its default
    {
        "bitsandbytes": "loftq.formats.bitsandbytes",
        "gptq": "loftq.formats.gptq",
        OURS: "loftq.formats.native",
        "loftq-trellis": "loftq.formats.trellis_streams",
        "bitsandbytes-fsdp": "loftq.formats.bitsandbytes_fsdp",  # never a default: bitsandbytes holds the same types
    }
)
if TYPE_CHECKING:
    from loftq.formats import bitsandbytes, bitsandbytes_fsdp, gptq, native, trellis_streams

    _COMPLETE: tuple[Layout, ...] = (
        bitsandbytes,
        bitsandbytes_fsdp,
        gptq,
        native,
        trellis_streams,
    )  # the type checker compares them


def choose(
    grids: Sequence[Grid],
    wanted: str | None,
    *,
    shapes: Collection[tuple[int, int]] = (),
    loadable: Collection[str] = tuple(LAYOUTS),
) -> str:
    """Return the name of the layout: the `wanted` one, or the first that can hold these types.

    `grids` are the types that layers may get; `loadable` are the layouts whose loaders accept the model's linears.
    Raises OptionError if the layout cannot hold the types, and names those that can.
    """
    if wanted is None:
        wanted = next((name for name in LAYOUTS if name in loadable and _fits(name, grids, shapes)), OURS)
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
            raise OptionError(
                f"--format {wanted} does not support {grid.sharing} {grid.block_size}: use one of {sizes}"
            )
    if len(grids) > 1 and not layout.SEVERAL_TYPES:
        raise OptionError(f"--format {wanted} holds one width a folder: use --format {OURS} for {grids[0]} and others")
    return wanted


def _fits(name: str, grids: Sequence[Grid], shapes: Collection[tuple[int, int]]) -> bool:
    layout = LAYOUTS[name]
    sides = all(side % layout.SIDES == 0 for shape in shapes for side in shape)
    return (len(grids) == 1 or layout.SEVERAL_TYPES) and all(map(layout.holds, grids)) and sides


def misfit(name: str, grid: Grid, rows: int, columns: int) -> str | None:
    """Explain why a layout cannot hold a linear of this shape, and what to use instead. None if it can."""
    layout, block = LAYOUTS[name], grid.block(columns)
    if rows % layout.SIDES or columns % layout.SIDES:
        return f"--format {name} needs both sides to be multiples of {layout.SIDES}: use --format {OURS}"
    if columns % block == 0:  # blocks across rows are legal, but bitsandbytes reads them wrongly on the CPU
        return f"its {columns} inputs are not a multiple of 8" if block % 8 and not grid.trellis else None
    option = f"--{grid.sharing.replace(' ', '-')}"
    fitting = [size for size in layout.BLOCK_SIZES if size != ROW and columns % size == 0]
    advice = f": use {option} {fitting[-1]}" if fitting else ""
    return f"{option} {block} does not divide its {columns} inputs{advice}"
