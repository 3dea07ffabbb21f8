"""Our own layout, `quant_method: loftq`, for what no stock format holds: codebooks of 2 and 3 bits, and linears
that stock loaders do not convert.

For a linear (out, in) with n = out · in weights in blocks of 64:

    weight                  uint8   (n · bits / 8)   codes, a dense stream with low bits first, row-major
    weight_scales           float16 (n / 64)         uint8 under double quantization
    weight_scales_absmax    float32 (n / 64 / 256 rounded up)    double quantization only
    weight_scales_offset    float32 (1)                          double quantization only

`config.json` says which codebook. A stock load of such a folder fails at the first weight, whose shape is not the
model's; transformers loads it once loftq is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from loftq.core.blockwise import SCALE_BLOCK, BlockQuantizer, NestedScales, Scales
from loftq.core.codebooks import CODEBOOKS
from loftq.core.packing import from_pairs, packed_size
from loftq.errors import ArtifactError, OptionError
from loftq.formats.checkpoint import TensorSpec

METHOD = "loftq"
VERSION = 1
BLOCK_SIZES: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALE_DTYPE = torch.float16


def check(codebook: str, block_size: int) -> None:
    """Raise OptionError where this format cannot hold such codes."""
    if codebook not in CODEBOOKS:
        raise OptionError(f"--format loftq holds {', '.join(CODEBOOKS)}, not {codebook}")
    if block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise OptionError(f"block size {block_size} is not one that --format loftq has (known: {sizes})")


def tensor_shapes(
    shape: Sequence[int], bits: int, block_size: int, double_quant: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of one linear, by its name within the module."""
    weights = shape[0] * shape[1]
    blocks = weights // block_size
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight": (torch.uint8, (packed_size(weights, bits),))}
    if not double_quant:
        return found | {"weight_scales": (SCALE_DTYPE, (blocks,))}
    return found | {
        "weight_scales": (torch.uint8, (blocks,)),
        "weight_scales_absmax": (torch.float32, (-(-blocks // SCALE_BLOCK),)),
        "weight_scales_offset": (torch.float32, (1,)),
    }


def specs(module: str, shape: Sequence[int], quantizer: BlockQuantizer, _dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of one linear."""
    shapes = tensor_shapes(shape, quantizer.bits, quantizer.block_size, quantizer.double_quant)
    return [TensorSpec(f"{module}.{name}", dtype, size) for name, (dtype, size) in shapes.items()]


def tensors(
    module: str,
    _shape: Sequence[int],
    quantizer: BlockQuantizer,
    _dtype: torch.dtype,
    codes: torch.Tensor,
    scales: Scales,
) -> dict[str, torch.Tensor]:
    """The named tensors of one linear from its codes, two a byte as the solver leaves them, and scales."""
    found = {"weight": from_pairs(codes, quantizer.bits)}
    nested = scales.nested
    if nested is None:
        found["weight_scales"] = scales.values.to(SCALE_DTYPE)
    else:
        found["weight_scales"] = nested.codes
        found["weight_scales_absmax"] = nested.absmax
        found["weight_scales_offset"] = torch.tensor([nested.offset])
    return {f"{module}.{name}": tensor for name, tensor in found.items()}


def read_scales(
    scales: torch.Tensor, absmax: torch.Tensor | None = None, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """The float32 scales that stored ones stand for."""
    if absmax is None or offset is None:
        return scales.float()
    return NestedScales(scales, absmax, 0.0).decode() + offset


def quantization_config(
    quantizer: BlockQuantizer, compute_dtype: torch.dtype, skip_modules: Sequence[str], codebooks: Mapping[str, str]
) -> dict[str, object]:
    """The entry of `config.json`: the commonest codebook, and the modules that have another by name."""
    (common, _), *_ = Counter(codebooks.values()).most_common()
    return {
        "quant_method": METHOD,
        "format_version": VERSION,
        "codebook": common,
        "codebooks": {module: name for module, name in codebooks.items() if name != common},
        "block_size": quantizer.block_size,
        "double_quant": quantizer.double_quant,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "skip_modules": list(skip_modules),
    }


def check_config(version: int, codebooks: Iterable[str]) -> None:
    """Raise ArtifactError for a folder that a later loftq wrote."""
    if version > VERSION:
        raise ArtifactError(f"loftq format version {version}: this loftq reads up to {VERSION}: upgrade loftq")
    unknown = sorted(set(codebooks) - set(CODEBOOKS))
    if unknown:
        raise ArtifactError(f"loftq format: codebook {unknown[0]!r} is none of {', '.join(CODEBOOKS)}: upgrade loftq")
