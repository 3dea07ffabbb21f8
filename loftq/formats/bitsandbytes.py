"""The 4-bit layout of bitsandbytes, as its `Linear4bit` saves and loads it.

For a linear (out, in) with n = out · in weights in blocks of 64:

    weight                                 uint8   (n / 2, 1)   even element in the high half, row-major
    weight.absmax                          float32 (n / 64)     uint8 under double quantization
    weight.quant_map                       float32 (16)
    weight.quant_state.bitsandbytes__nf4   uint8   JSON: quant_type, blocksize, dtype, shape, …
    weight.nested_absmax                   float32 (n / 64 / 256 rounded up)    double quantization only
    weight.nested_quant_map                float32 (256)                        double quantization only

`dtype` is the dtype that dequantization returns. The JSON is padded with blanks to a length that does not
depend on the values in it, so that the layout of a file is known before its weights are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch

from loftq.core.blockwise import SCALE_BLOCK, BlockQuantizer, Scales
from loftq.core.codebooks import dynamic_map
from loftq.errors import OptionError
from loftq.formats.checkpoint import TensorSpec

BLOCK_SIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALE_DTYPE = torch.float32
CODEBOOKS = {"nf4"}
_OFFSET_WIDTH = 24  # characters of the longest float64 in JSON


def check(codebook: str, block_size: int) -> None:
    """Raise OptionError where this format cannot hold such codes."""
    if codebook not in CODEBOOKS:
        raise OptionError(
            f"--format bitsandbytes holds {', '.join(sorted(CODEBOOKS))}, not {codebook}: use --format loftq"
        )
    if block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise OptionError(f"block size {block_size} is not one that bitsandbytes has (known: {sizes})")


def specs(module: str, shape: Sequence[int], quantizer: BlockQuantizer, dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of one linear, in the order in which `tensors` gives them."""
    weights = shape[0] * shape[1]
    blocks = weights // quantizer.block_size
    key = f"{module}.weight"
    state = _quant_state(shape, quantizer, dtype, 0.0)
    found = [
        TensorSpec(key, torch.uint8, (weights // 2, 1)),
        TensorSpec(f"{key}.absmax", torch.uint8 if quantizer.double_quant else torch.float32, (blocks,)),
        TensorSpec(f"{key}.quant_map", torch.float32, (len(quantizer.levels),)),
        TensorSpec(f"{key}.quant_state.bitsandbytes__{quantizer.codebook}", torch.uint8, (len(state),)),
    ]
    if quantizer.double_quant:
        found += [
            TensorSpec(f"{key}.nested_absmax", torch.float32, (-(-blocks // SCALE_BLOCK),)),
            TensorSpec(f"{key}.nested_quant_map", torch.float32, (256,)),
        ]
    return found


def tensors(
    module: str,
    shape: Sequence[int],
    quantizer: BlockQuantizer,
    dtype: torch.dtype,
    codes: torch.Tensor,
    scales: Scales,
) -> dict[str, torch.Tensor]:
    """The named tensors of one linear from its codes, uint8 (n / 2,), and scales."""
    nested = scales.nested
    values = [
        codes.view(-1, 1),
        scales.values if nested is None else nested.codes,
        quantizer.levels,
        _quant_state(shape, quantizer, dtype, 0.0 if nested is None else nested.offset),
    ]
    if nested is not None:
        values += [nested.absmax, dynamic_map()]
    names = [spec.name for spec in specs(module, shape, quantizer, dtype)]
    return dict(zip(names, values, strict=True))


def quantization_config(
    quantizer: BlockQuantizer,
    compute_dtype: torch.dtype,
    skip_modules: Sequence[str],
    _codebooks: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """The entry of `config.json`. `skip_modules` replaces the library's defaults: it must list the head."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": quantizer.codebook,
        "bnb_4bit_use_double_quant": quantizer.double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip_modules),
        "llm_int8_threshold": 6.0,
    }


def _quant_state(shape: Sequence[int], quantizer: BlockQuantizer, dtype: torch.dtype, offset: float) -> torch.Tensor:
    state: dict[str, object] = {
        "quant_type": quantizer.codebook,
        "blocksize": quantizer.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    text = json.dumps(state)
    if quantizer.double_quant:
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": 0}
        width = len(json.dumps(state)) + _OFFSET_WIDTH
        state["nested_offset"] = offset
        text = json.dumps(state).ljust(width)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
