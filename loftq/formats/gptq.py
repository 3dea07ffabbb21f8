"""GPTQ's layout, version 2: integers in groups, as gptqmodel and the servers that read its folders expect them.

For a linear (out, in) of b bits in groups of g consecutive inputs (arXiv 2210.17323; `checkpoint_format: gptq_v2`):

    qweight   int32   (in · b / 32, out)      codes; each column is a dense stream, low bits first
    qzeros    int32   (in / g, out · b / 32)  zero-points (version 1 stored them minus 1); streams along rows
    scales    float16 (in / g, out)
    g_idx     int32   (in)                    the group of each input: i div g, no reordering

    W~ = scale · (code − zero)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loftq.core.affine import FLOATING, shifts_of
from loftq.core.grid import ROW, Grid
from loftq.core.packing import pack, paired, single, unpack
from loftq.core.scales import Scales, Solved
from loftq.errors import ArtifactError
from loftq.formats.checkpoint import TensorSpec
from loftq.formats.model_config import FILE
from loftq.formats.model_config import read_config as read_model_config
from loftq.formats.model_files import check_model_folder
from loftq.formats.schema import Limited, check_value

METHOD = "gptq"
CHECKPOINT_FORMAT = "gptq_v2"
READABLE = {METHOD: 1, CHECKPOINT_FORMAT: 0}  # the number that each format subtracts from zero-points
BLOCK_SIZES: tuple[int, ...] = (ROW, 16, 32, 64, 128, 256, 512, 1024)
SIDES = 32  # codes fill words of 32 bits, along inputs and along outputs
SCALE_DTYPE = torch.float16
BITS = (2, 3, 4, 8)
HOLDS = (
    f"{', '.join(f'int{bits}' for bits in BITS)} with symmetric or integer zero-points and 16-bit scales, one type a "
    "folder"
)
_ENTRY = {
    "bits": Limited(f"one of {', '.join(map(str, BITS))}", lambda v: type(v) is int and v in BITS),
    "group_size": Limited(
        f"a positive whole number or {ROW}", lambda v: type(v) is int and (v == ROW or 0 < v < 2**31)
    ),
    "sym?": bool,
    "checkpoint_format?": (str, None),
    "format?": (str, None),
}
STOCK = True
EXPERTS = False
SEVERAL_TYPES = False
WITHOUT_WEIGHT = True
IN_MEMORY = False
LINEARS = "loftq.models.gptq_linear"
PLUGIN: str | None = "loftq.models.gptq_quantizer"  # used if gptqmodel is not installed
IMPORT_LINE = "import loftq  # not needed if gptqmodel and optimum are installed\n"
PLAN_NOTE = "stock transformers need gptqmodel and optimum to load GPTQ; without them, import loftq first"


def holds(grid: Grid) -> bool:
    """Whether this format can hold codes of this type."""
    return grid.integer and grid.bits in BITS and grid.zero_point not in FLOATING and not grid.double_quant


def tensor_shapes(shape: Sequence[int], grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of one linear, by its name within the module."""
    rows, columns = shape
    groups = columns // grid.block(columns)
    return {
        "qweight": (torch.int32, (columns * grid.bits // 32, rows)),
        "qzeros": (torch.int32, (groups, rows * grid.bits // 32)),
        "scales": (SCALE_DTYPE, (groups, rows)),
        "g_idx": (torch.int32, (columns,)),
    }


def specs(module: str, shape: Sequence[int], grid: Grid, _dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of one linear."""
    return [TensorSpec(f"{module}.{name}", dtype, size) for name, (dtype, size) in tensor_shapes(shape, grid).items()]


def tensors(
    module: str, shape: Sequence[int], grid: Grid, _dtype: torch.dtype, codes: torch.Tensor, scales: Scales
) -> dict[str, torch.Tensor]:
    """The named tensors of one linear from its codes, as the solver leaves them, and scales."""
    rows, columns = shape
    block = grid.block(columns)
    stream = pack(single(codes, grid.bits), grid.bits)
    zeros = scales.zeros
    if zeros is None:
        zeros = torch.full_like(scales.values, 2 ** (grid.bits - 1), dtype=torch.uint8)
    parts = {
        "qweight": stream.view(rows, -1).view(torch.int32).t(),
        "qzeros": pack(zeros.view(rows, -1).t().reshape(-1), grid.bits).view(torch.int32).view(columns // block, -1),
        "scales": scales.values.view(rows, -1).t().to(SCALE_DTYPE),
        "g_idx": torch.arange(columns, dtype=torch.int32) // block,
    }
    return {f"{module}.{name}": tensor.contiguous() for name, tensor in parts.items()}


def read(module: str, shape: Sequence[int], grid: Grid, tensor: Callable[[str], torch.Tensor], less: int = 0) -> Solved:
    """The inverse of `tensors`: codes as the solver leaves them, and scales. `less` is 1 for version 1."""
    rows, columns = shape
    codes = unpack(read_stream(tensor(f"{module}.qweight")), grid.bits, rows * columns)
    scales = tensor(f"{module}.scales")
    zeros = _read_zeros(tensor(f"{module}.qzeros"), scales.shape, grid.bits, less)
    values = _by_rows(scales)
    shifts = shifts_of(zeros, values, grid.bits)
    return paired(codes, grid.bits), Scales(values, None, shifts, zeros.to(torch.uint8))


def read_stream(qweight: torch.Tensor) -> torch.Tensor:
    """The codes of some outputs as one dense stream, row-major: uint8, from int32 (in · bits / 32, outputs)."""
    return qweight.t().contiguous().view(torch.uint8).view(-1)


def read_scales(
    scales: torch.Tensor, qzeros: torch.Tensor, bits: int, less: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of each group, row-major: float32 (out · in / group,) each. `less` is 1 for version 1."""
    values = _by_rows(scales)
    return values, shifts_of(_read_zeros(qzeros, scales.shape, bits, less), values, bits)


def _by_rows(scales: torch.Tensor) -> torch.Tensor:
    """Scales (groups, out) as a new float32 (out · groups,)."""
    return scales.t().to(torch.float32, copy=True).contiguous().view(-1)


def _read_zeros(qzeros: torch.Tensor, shape: Sequence[int], bits: int, less: int) -> torch.Tensor:
    """Zero-points (groups, out) row-major: int16 (out · groups,), which has room for version 1's 256."""
    groups, rows = shape
    zeros = unpack(qzeros.contiguous().view(-1).view(torch.uint8), bits, groups * rows)
    return zeros.view(groups, rows).t().reshape(-1).short() + less


def is_gptq(folder: Path) -> bool:
    """Whether the `config.json` of a folder names GPTQ.

    Raises CheckpointError for links that leave the folder, and ArtifactError if the file is damaged.
    """
    if not folder.is_dir():
        return False
    check_model_folder(folder)
    if not (folder / FILE).is_file():
        return False
    entry = read_model_config(folder, ArtifactError).get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD


def is_ordered(g_idx: torch.Tensor, block: int) -> bool:
    """Whether groups consist of consecutive inputs. In act-order checkpoints they do not."""
    return torch.equal(g_idx, torch.arange(len(g_idx), dtype=g_idx.dtype, device=g_idx.device) // block)


def input_groups(
    module: str, shape: Sequence[int], grid: Grid, tensor: Callable[[str], torch.Tensor]
) -> torch.Tensor | None:
    """The group of each input, int32 (in), in act-order checkpoints; None if groups consist of consecutive inputs."""
    g_idx = tensor(f"{module}.g_idx")
    return None if is_ordered(g_idx, grid.block(shape[1])) else g_idx


def grid_of(bits: int, group_size: int, symmetric: bool) -> Grid:
    """The type of the weights of a folder, from the values in its `config.json`."""
    return Grid(f"int{bits}", group_size, zero_point="symmetric" if symmetric else "integer")


def read_config(entry: Mapping[str, Any], folder: Path) -> tuple[Grid, int]:
    """The type of a folder's weights, and the number that was subtracted from zero-points. Raises ArtifactError."""
    check_value(entry, _ENTRY, f"quantization_config in {folder / FILE}")
    version = entry.get("checkpoint_format") or entry.get("format") or METHOD
    if version not in READABLE:
        raise ArtifactError(f"{folder / FILE}: GPTQ's format {version!r} cannot be read (known: {', '.join(READABLE)})")
    return grid_of(entry["bits"], entry["group_size"], entry.get("sym", True)), READABLE[version]


def shapes_of(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """The shape (out, in) of each linear among the tensors of a checkpoint. Raises ArtifactError if one is missing."""
    modules = [name.removesuffix(".qweight") for name in specs if name.endswith(".qweight")]
    for module in modules:
        for name, sides in (("qweight", 2), ("qzeros", 2), ("scales", 2), ("g_idx", 1)):
            spec = specs.get(f"{module}.{name}")
            if spec is None or len(spec.shape) != sides:
                problem = "is missing" if spec is None else f"has the shape {spec.shape}, expected {sides} sides"
                raise ArtifactError(f"tensor {module}.{name!s} of the GPTQ checkpoint {problem}: download it again")
    return {module: (specs[f"{module}.qweight"].shape[1], specs[f"{module}.g_idx"].numel) for module in modules}


def load_options(_recipe: Mapping[str, Any]) -> str:
    """An empty string: `config.json` contains everything."""
    return ""


def card_note(_grid: Grid) -> str:
    """The note in the card on loading the folder."""
    return """- The format is GPTQ, version 2. Stock transformers load it if gptqmodel and optimum are
  installed. If they are not, `import loftq` first."""


def quantization_config(
    grid: Grid,
    _compute_dtype: torch.dtype,
    _skip_modules: Sequence[str],
    codebooks: Mapping[str, str],
    target_modules: Sequence[str],
    _target_parameters: Sequence[str] = (),
) -> dict[str, object]:
    """The entry of `config.json`. It lists the ends of names of quantized modules, within the blocks' common path."""
    return {
        "quant_method": METHOD,
        "checkpoint_format": CHECKPOINT_FORMAT,
        "bits": grid.bits,
        "group_size": grid.block_size,
        "sym": grid.zero_point == "symmetric",
        "desc_act": False,
        "block_name_to_quantize": os.path.commonpath([_path(name) for name in codebooks]).replace("/", "."),
        "modules_in_block_to_quantize": [list(target_modules)],
        "meta": {"quantizer": ["loftq"]},
    }


def _path(module: str) -> str:
    """The names of the modules around one, up to the first number, as a path."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return "/".join(parts[: numbers[0] if numbers else -1])
