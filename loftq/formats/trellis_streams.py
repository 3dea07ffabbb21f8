"""The layout of trellis-coded weights (`core.trellis`), `quant_method: loftq-trellis`.

For a linear (out, in):

    weight            int32   (words,)    the streams of all columns, one after the other, and a word more
    weight_widths     uint8   (in,)       bits of a weight in each column; of 0 bits, the column is zero
    weight_rows       float32 (out,)      r, the scales of rows
    weight_columns    float16 (in,)       c, the scales of columns

    W~[t, j] = r[t] · c[j] · table_b[state_j(t)],     b = widths[j],     state_j(t) = bits [b·t, b·t + L) of stream j

L is 12, or 10 for the type tcqfast. Bits are counted from the lowest of each little-endian word. The stream of a column
has b·(out − 1) + L bits. Tables of 2^L levels come with loftq. The number of words follows from the budget: the sum of
all widths is `bits · in`, rounded down.

For fused experts (experts, out, in), the tensors of all experts are stacked, and named as in our own layout
(`native`): `experts.up_proj` int32 (experts, words), `experts.up_proj_widths` and so on. The streams of each expert
begin anew.

`config.json` names the budget. A stock load of such a folder fails at the first weight, whose shape is not the model's;
transformers loads it once loftq is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from loftq.core.codebooks import CODEBOOKS
from loftq.core.grid import ROW, Grid
from loftq.core.scales import Scales, Solved
from loftq.core.trellis import TrellisScales, words_of
from loftq.errors import ArtifactError
from loftq.formats.checkpoint import TensorSpec
from loftq.formats.native import stored_name

METHOD = "loftq-trellis"
TENSORS = ("weight", "weight_widths", "weight_rows", "weight_columns")
VERSION = 1
BLOCK_SIZES: tuple[int, ...] = (ROW,)
SIDES = 1
SCALE_DTYPE = torch.float32
HOLDS = "trellis codes"
STOCK = False
EXPERTS = True
SEVERAL_TYPES = True
WITHOUT_WEIGHT = False
IN_MEMORY = True
LINEARS = "loftq.models.trellis_linears"
PLUGIN: str | None = "loftq.models.trellis_quantizer"
IMPORT_LINE = "import loftq  # teaches transformers this folder's format; without it the folder is refused\n"
PLAN_NOTE = "stock transformers cannot load {what}: import loftq before from_pretrained, or use loftq.{loader}"


def holds(grid: Grid) -> bool:
    """Whether this format can hold codes of this type."""
    return grid.trellis


def tensor_shapes(shape: Sequence[int], grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of one linear, by its name within the module."""
    rows, columns = shape
    kinds = (torch.int32, torch.uint8, torch.float32, torch.float16)
    sizes = (words_of((rows, columns), grid.bits, grid.state_bits), columns, rows, columns)
    return {name: (kind, (size,)) for name, kind, size in zip(TENSORS, kinds, sizes, strict=True)}


def specs(module: str, shape: Sequence[int], grid: Grid, _dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of one linear, or of a stack of experts."""
    *experts, rows, columns = shape
    return [
        TensorSpec(stored_name(module, shape, name), dtype, (*experts, *size))
        for name, (dtype, size) in tensor_shapes((rows, columns), grid).items()
    ]


def tensors(
    module: str, shape: Sequence[int], _grid: Grid, _dtype: torch.dtype, codes: torch.Tensor, scales: Scales
) -> dict[str, torch.Tensor]:
    """The named tensors of one linear or expert from its codes and scales."""
    own = cast(TrellisScales, scales)
    values = (codes, own.widths, own.values, own.columns)
    return {stored_name(module, shape, name): value for name, value in zip(TENSORS, values, strict=True)}


def read(module: str, shape: Sequence[int], _grid: Grid, tensor: Callable[[str], torch.Tensor]) -> Solved:
    """The inverse of `tensors`: codes and scales."""
    codes, widths, rows, columns = (tensor(stored_name(module, shape, name)) for name in TENSORS)
    return codes, TrellisScales(rows, columns=columns, widths=widths)


def input_groups(
    _module: str, _shape: Sequence[int], _grid: Grid, _tensor: Callable[[str], torch.Tensor]
) -> torch.Tensor | None:
    """None: there are no groups."""
    return None


def load_options(_recipe: Mapping[str, Any]) -> str:
    """An empty string: `config.json` contains everything."""
    return ""


def card_note(_grid: Grid) -> str:
    """The note in the card on loading the folder."""
    return "- The weights stay coded in memory. `merge_and_unload` gives a dense model with the adapter in it."


def quantization_config(
    _grid: Grid,
    compute_dtype: torch.dtype,
    skip_modules: Sequence[str],
    codebooks: Mapping[str, str],
    _target_modules: Sequence[str] = (),
    target_parameters: Sequence[str] = (),
) -> dict[str, object]:
    """The entry of `config.json`: the commonest budget, and the modules that have another by name."""
    (common, _), *_ = Counter(codebooks.values()).most_common()
    return {
        "quant_method": METHOD,
        "format_version": VERSION,
        "codebook": common,
        "codebooks": {module: name for module, name in codebooks.items() if name != common},
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "skip_modules": list(skip_modules),
        **({"experts": list(target_parameters)} if target_parameters else {}),
    }


def check_config(version: int, codebooks: Iterable[str]) -> None:
    """Raise ArtifactError for a folder that a later loftq wrote."""
    if version > VERSION:
        raise ArtifactError(f"{METHOD} format version {version}: this loftq reads up to {VERSION}: upgrade loftq")
    for name in codebooks:
        if name not in CODEBOOKS or not Grid(name, ROW).trellis:
            raise ArtifactError(f"{METHOD} format: {name!r} is no trellis code of this loftq: upgrade loftq")
