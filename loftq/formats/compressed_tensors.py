"""The layout `pack-quantized` of compressed-tensors, which vLLM and SGLang read: integers in groups of inputs.

For a linear (out, in) of b bits in groups of g consecutive inputs:

    weight_packed      int32 (out, in · b / 32)      codes; each row is a dense stream, low bits first
    weight_scale       16 bits (out, in / g)         in the dtype in which servers compute
    weight_zero_point  int32 (out · b / 32, in / g)  zero-points, if they are not symmetric; streams along columns
    weight_shape       int64 (2)                     out, in

    W~ = scale · (code − zero),  zero = 2^(b−1) if symmetric

Zero-points are whole numbers of b bits, so this layout cannot hold the shift of a QA-LoRA exactly. The package computes
W~ in the dtype of the scales; our reader computes it in float32, and rounding that gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loftq.core.grid import Grid
from loftq.core.packing import pack, single, unpack
from loftq.core.scales import Scales
from loftq.formats.checkpoint import TensorSpec

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
BITS = (4, 8)  # the widths that servers have kernels for
GROUP_SIZES = (128, 64, 32)  # the same; the first that divides all inputs is the default
ZERO_POINTS = ("symmetric", "integer")
WORD = 32  # bits of the words that codes and zero-points fill


def specs(module: str, shape: Sequence[int], grid: Grid, dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of one linear; `dtype` is that of the scales."""
    rows, columns = shape
    groups = columns // grid.block(columns)
    tensors = [
        TensorSpec(f"{module}.weight_packed", torch.int32, (rows, columns * grid.bits // WORD)),
        TensorSpec(f"{module}.weight_scale", dtype, (rows, groups)),
        TensorSpec(f"{module}.weight_shape", torch.int64, (2,)),
    ]
    if grid.zero_point == "integer":
        tensors.append(TensorSpec(f"{module}.weight_zero_point", torch.int32, (rows * grid.bits // WORD, groups)))
    return tensors


def tensors(
    module: str, shape: Sequence[int], grid: Grid, dtype: torch.dtype, codes: torch.Tensor, scales: Scales
) -> dict[str, torch.Tensor]:
    """The named tensors of one linear from its codes, as the solver leaves them, and scales."""
    rows, columns = shape
    stream = pack(single(codes, grid.bits), grid.bits)
    parts = {
        "weight_packed": stream.view(torch.int32).view(rows, -1),
        "weight_scale": scales.values.view(rows, -1).to(dtype),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if scales.zeros is not None:
        by_groups = scales.zeros.view(rows, -1).t().reshape(-1)  # (groups · out)
        packed = pack(by_groups, grid.bits).view(torch.int32)
        parts["weight_zero_point"] = packed.view(columns // grid.block(columns), -1).t()
    return {f"{module}.{name}": tensor.contiguous() for name, tensor in parts.items()}


def dense(module: str, shape: Sequence[int], grid: Grid, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The weight (out, in) as the package computes it, in the dtype of the scales, from a reader of tensors by name."""
    rows, columns = shape
    stream = tensor(f"{module}.weight_packed").contiguous().view(-1).view(torch.uint8)
    scales = tensor(f"{module}.weight_scale")
    groups = scales.shape[1]
    codes = unpack(stream, grid.bits, rows * columns).view(rows, groups, -1).float()
    zeros: torch.Tensor | float = 2.0 ** (grid.bits - 1)
    if grid.zero_point == "integer":
        packed = tensor(f"{module}.weight_zero_point").t().contiguous().view(-1).view(torch.uint8)
        zeros = unpack(packed, grid.bits, rows * groups).view(groups, rows).t().unsqueeze(2).float()
    return ((codes - zeros) * scales.unsqueeze(2).float()).view(rows, columns).to(scales.dtype)


def quantization_config(grid: Grid, ignored: Sequence[str]) -> dict[str, object]:
    """The entry of `config.json`. `ignored` are the linears that stay dense."""
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.zero_point == "symmetric",
        "strategy": "group",
        "group_size": grid.block_size,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
