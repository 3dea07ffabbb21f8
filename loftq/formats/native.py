"""Our own layout, `quant_method: loftq`, for weights that no stock format can hold: codebooks of 2 and 3 bits, integers
with floating zero-points, several widths in one folder, and linears that stock loaders do not convert.

For a linear (out, in) with n = out · in weights, of which g share a scale:

    weight                  uint8   (n · bits / 8)   codes, a dense row-major stream, low bits first
    weight_scales           float16 (n / g)          uint8 under double quantization
    weight_scales_absmax    float32 (n / g / 256 rounded up)    double quantization only
    weight_scales_offset    float32 (1)                         double quantization only
    weight_zeros            uint8   (n · bits / g / 8 rounded up)    zero-points, packed like codes: integer ones only
    weight_shifts           float16 (n / g)          floating zero-points only; float32 if an adapter was merged

    W~ = scale · level + shift,  shift = 0, or scale · (2^(bits−1) − zero), or the stored shift

For fused experts (experts, out, in), the tensors of all experts are stacked, and named after the parameter: with
`experts.up_proj` in the place of `weight`, uint8 (experts, out · in · bits / 8), `experts.up_proj_scales` and so on. An
expert is thus stored like a linear, whatever the order of its sides in the model.

`config.json` names the codebook. A stock load of such a folder fails at the first weight, whose shape is not the
model's; transformers loads it once loftq is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from loftq.core.affine import FLOATING, shifts_of
from loftq.core.codebooks import INTEGERS, TABLES, ZERO_POINTS
from loftq.core.grid import ROW, Grid
from loftq.core.packing import pack, packed_size, paired, single, unpack
from loftq.core.scales import SCALE_BLOCK, NestedScales, Scales, Solved
from loftq.errors import ArtifactError
from loftq.formats.checkpoint import TensorSpec

METHOD = "loftq"
VERSION = 2
_WITHOUT_EXPERTS = 1  # the version of a folder whose experts are not quantized
BLOCK_SIZES: tuple[int, ...] = (ROW, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SIDES = 1
SCALE_DTYPE = torch.float16
WEIGHT = "weight"
HOLDS = f"{', '.join([*TABLES, *INTEGERS])} with zero-points of every kind"
STOCK = False
EXPERTS = True
SEVERAL_TYPES = True
WITHOUT_WEIGHT = False
IN_MEMORY = True
LINEARS = "loftq.models.native_linears"
PLUGIN: str | None = "loftq.models.native_quantizer"
IMPORT_LINE = "import loftq  # teaches transformers this folder's format; without it the folder is refused\n"
PLAN_NOTE = "stock transformers cannot load {what}: import loftq before from_pretrained, or use loftq.{loader}"


def holds(grid: Grid) -> bool:
    """Whether this format can hold codes of this type: all types, but codebooks only in blocks."""
    return grid.integer or grid.block_size != ROW


def tensor_shapes(shape: Sequence[int], grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of one linear, by its name within the module."""
    weights = shape[0] * shape[1]
    groups = weights // grid.block(shape[1])
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        WEIGHT: (torch.uint8, (packed_size(weights, grid.bits),)),
        "weight_scales": (torch.uint8 if grid.double_quant else SCALE_DTYPE, (groups,)),
    }
    if grid.double_quant:
        parts["weight_scales_absmax"] = (torch.float32, (-(-groups // SCALE_BLOCK),))
        parts["weight_scales_offset"] = (torch.float32, (1,))
    if grid.integer and grid.zero_point == "integer":
        parts["weight_zeros"] = (torch.uint8, (packed_size(groups, grid.bits),))
    if grid.integer and grid.zero_point in FLOATING:
        parts["weight_shifts"] = (FLOATING[grid.zero_point], (groups,))
    return parts


def stored_name(module: str, shape: Sequence[int], name: str) -> str:
    """The full name of the tensor `name` of a linear, or of the one that takes its place for a stack of experts."""
    return f"{module}.{name}" if len(shape) == 2 else f"{module}{name.removeprefix(WEIGHT)}"


def specs(module: str, shape: Sequence[int], grid: Grid, _dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of one linear, or of a stack of experts."""
    *experts, rows, columns = shape
    return [
        TensorSpec(stored_name(module, shape, name), dtype, (*experts, *size))
        for name, (dtype, size) in tensor_shapes((rows, columns), grid).items()
    ]


def tensors(
    module: str, shape: Sequence[int], grid: Grid, _dtype: torch.dtype, codes: torch.Tensor, scales: Scales
) -> dict[str, torch.Tensor]:
    """The named tensors of one linear or expert from its codes, as the solver leaves them, and scales."""
    parts = {WEIGHT: pack(single(codes, grid.bits), grid.bits)}
    nested = scales.nested
    if nested is None:
        parts["weight_scales"] = scales.values.to(SCALE_DTYPE)
    else:
        parts["weight_scales"] = nested.codes
        parts["weight_scales_absmax"] = nested.absmax
        parts["weight_scales_offset"] = torch.tensor([nested.offset])
    if scales.zeros is not None:
        parts["weight_zeros"] = pack(scales.zeros, grid.bits)
    elif scales.shifts is not None:
        parts["weight_shifts"] = scales.shifts.to(FLOATING[str(grid.zero_point)])
    return {stored_name(module, shape, name): tensor for name, tensor in parts.items()}


def read(module: str, shape: Sequence[int], grid: Grid, tensor: Callable[[str], torch.Tensor]) -> Solved:
    """The inverse of `tensors`: codes as the solver leaves them, and scales."""
    rows, columns = shape[-2:]
    stored = {name: tensor(stored_name(module, shape, name)) for name in tensor_shapes((rows, columns), grid)}
    codes = paired(unpack(stored[WEIGHT], grid.bits, rows * columns), grid.bits)
    nested = None
    values = stored["weight_scales"].float()
    if grid.double_quant:
        absmax, offset = stored["weight_scales_absmax"], stored["weight_scales_offset"]
        nested = NestedScales(stored["weight_scales"], absmax, float(offset))
        values = nested.decode()
    zeros = shifts = None
    if "weight_zeros" in stored:
        zeros = unpack(stored["weight_zeros"], grid.bits, len(values))
        shifts = shifts_of(zeros, values, grid.bits)
    elif "weight_shifts" in stored:
        shifts = stored["weight_shifts"].float()
    return codes, Scales(values, nested, shifts, zeros)


def read_scales(
    scales: torch.Tensor, absmax: torch.Tensor | None = None, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """Decode stored scales to float32."""
    if absmax is None or offset is None:
        return scales.float()
    return NestedScales(scales, absmax, 0.0).decode() + offset


def read_zeros(zeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Decode packed zero-points to float32 shifts, for float32 scales."""
    return shifts_of(unpack(zeros, bits, len(scales)), scales, bits)


def input_groups(
    _module: str, _shape: Sequence[int], _grid: Grid, _tensor: Callable[[str], torch.Tensor]
) -> torch.Tensor | None:
    """None: groups always consist of consecutive inputs."""
    return None


def load_options(_recipe: Mapping[str, Any]) -> str:
    """An empty string: `config.json` contains everything."""
    return ""


def card_note(_grid: Grid) -> str:
    """The note in the card on loading the folder."""
    return "- The weights stay packed in memory. `merge_and_unload` gives a dense model with the adapter in it."


def quantization_config(
    grid: Grid,
    compute_dtype: torch.dtype,
    skip_modules: Sequence[str],
    codebooks: Mapping[str, str],
    _target_modules: Sequence[str] = (),
    target_parameters: Sequence[str] = (),
) -> dict[str, object]:
    """The entry of `config.json`: the commonest codebook, and the modules that have another by name."""
    experts = {"experts": list(target_parameters)} if target_parameters else {}
    (common, _), *_ = Counter(codebooks.values()).most_common()
    return {
        "quant_method": METHOD,
        "format_version": VERSION if experts else _WITHOUT_EXPERTS,
        "codebook": common,
        "codebooks": {module: name for module, name in codebooks.items() if name != common},
        "block_size": grid.block_size,
        "zero_point": grid.zero_point,
        "double_quant": grid.double_quant,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "skip_modules": list(skip_modules),
        **experts,
    }


def check_config(version: int, codebooks: Iterable[str], zero_point: str | None) -> None:
    """Raise ArtifactError for a folder that a later loftq wrote."""
    if version > VERSION:
        raise ArtifactError(f"loftq format version {version}: this loftq reads up to {VERSION}: upgrade loftq")
    for kind, names, known in (
        ("codebook", codebooks, {**TABLES, **INTEGERS}),
        ("zero-point", () if zero_point is None else (zero_point,), ZERO_POINTS),
    ):
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ArtifactError(
                f"loftq format: {kind} {unknown[0]!r} is unknown (expected one of {', '.join(known)}): upgrade loftq"
            )
