"""The layouts of bitsandbytes, as its `Linear4bit` and `Linear8bitLt` save and load them.

For a linear (out, in) with n = out · in weights in blocks of 64:

    weight                                 uint8   (n / 2, 1)   even element in the high half, row-major
    weight.absmax                          float32 (n / 64)     uint8 under double quantization
    weight.quant_map                       float32 (16)
    weight.quant_state.bitsandbytes__nf4   uint8   JSON: quant_type, blocksize, dtype, shape, …
    weight.nested_absmax                   float32 (n / 64 / 256 rounded up)    double quantization only
    weight.nested_quant_map                float32 (256)                        double quantization only

and for INT8 (arXiv 2208.07339), with one scale for each row and codes from −127 to 127,

    weight          int8    (out, in)
    SCB             float32 (out)       127 times the scale
    weight_format   uint8   ()          0: row-major

`dtype` is the dtype that dequantization returns. The JSON is padded with blanks to a length that does not
depend on the values in it, so that the layout of a file is known before its weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from loftq.core.codebooks import codebook, dynamic_map
from loftq.core.grid import ROW, Grid
from loftq.core.scales import SCALE_BLOCK, NestedScales, Scales, Solved
from loftq.formats.checkpoint import TensorSpec
from loftq.formats.schema import json_text, parse_json

METHOD = "bitsandbytes"
BLOCK_SIZES: tuple[int, ...] = (ROW, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SIDES = 1
SCALE_DTYPE = torch.float32
HOLDS = "nf4 in blocks, and int8 with one symmetric scale for each row, without double quantization"
STOCK = True
EXPERTS = False
SEVERAL_TYPES = False
WITHOUT_WEIGHT = False
IN_MEMORY = True
LINEARS = "loftq.models.bitsandbytes_linears"
PLUGIN: str | None = None  # stock transformers know it
IMPORT_LINE = ""
PLAN_NOTE = ""
_OFFSET_WIDTH = 24  # characters of the longest float64 in JSON


def holds(grid: Grid) -> bool:
    """Whether this format can hold codes of this type."""
    if grid.codebook == "int8":
        return grid.block_size == ROW and grid.zero_point == "symmetric" and not grid.double_quant
    return grid.codebook == "nf4" and grid.block_size != ROW


def specs(module: str, shape: Sequence[int], grid: Grid, dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of one linear, in the order in which `tensors` gives them."""
    key = f"{module}.weight"
    if grid.bits == 8:
        return [
            TensorSpec(key, torch.int8, (shape[0], shape[1])),
            TensorSpec(f"{module}.SCB", torch.float32, (shape[0],)),
            TensorSpec(f"{module}.weight_format", torch.uint8, ()),
        ]
    weights = shape[0] * shape[1]
    blocks = weights // grid.block_size
    state = _quant_state(shape, grid, dtype, 0.0)
    entries = [
        TensorSpec(key, torch.uint8, (weights // 2, 1)),
        TensorSpec(f"{key}.absmax", torch.uint8 if grid.double_quant else torch.float32, (blocks,)),
        TensorSpec(f"{key}.quant_map", torch.float32, (2**grid.bits,)),
        TensorSpec(f"{key}.quant_state.bitsandbytes__{grid.codebook}", torch.uint8, (len(state),)),
    ]
    if grid.double_quant:
        entries += [
            TensorSpec(f"{key}.nested_absmax", torch.float32, (-(-blocks // SCALE_BLOCK),)),
            TensorSpec(f"{key}.nested_quant_map", torch.float32, (256,)),
        ]
    return entries


def tensors(
    module: str, shape: Sequence[int], grid: Grid, dtype: torch.dtype, codes: torch.Tensor, scales: Scales
) -> dict[str, torch.Tensor]:
    """The named tensors of one linear from its codes, as the solver leaves them, and scales."""
    names = [spec.name for spec in specs(module, shape, grid, dtype)]
    if grid.bits == 8:
        levels = (codes.view(shape[0], shape[1]) ^ 128).view(torch.int8)  # code − 128
        return dict(zip(names, (levels, scales.values * 127, torch.tensor(0, dtype=torch.uint8)), strict=True))
    nested = scales.nested
    values = [
        codes.view(-1, 1),
        scales.values if nested is None else nested.codes,
        codebook(grid.codebook),
        _quant_state(shape, grid, dtype, 0.0 if nested is None else nested.offset),
    ]
    if nested is not None:
        values += [nested.absmax, dynamic_map()]
    return dict(zip(names, values, strict=True))


def read(module: str, shape: Sequence[int], grid: Grid, tensor: Callable[[str], torch.Tensor]) -> Solved:
    """The inverse of `tensors`: codes as the solver leaves them, and scales."""
    names = [spec.name for spec in specs(module, shape, grid, torch.float32)]
    if grid.bits == 8:
        levels, scb = tensor(names[0]), tensor(names[1])
        return (levels.view(torch.uint8) ^ 128).view(-1), Scales(scb / 127)  # code = level + 128
    codes, absmax, _, state = (tensor(name) for name in names[:4])
    if not grid.double_quant:
        return codes.view(-1), Scales(absmax)
    content: dict[str, float] = parse_json(
        bytes(state.flatten().view(torch.uint8).tolist()), f"tensor {names[3]}", {"nested_offset": float}
    )
    offset = float(content["nested_offset"])
    nested = NestedScales(absmax, tensor(names[4]), offset)
    return codes.view(-1), Scales(nested.decode(), nested)


def input_groups(
    _module: str, _shape: Sequence[int], _grid: Grid, _tensor: Callable[[str], torch.Tensor]
) -> torch.Tensor | None:
    """None: blocks always consist of consecutive inputs."""
    return None


def load_options(recipe: Mapping[str, Any]) -> str:
    """The `quantization_config` that `from_pretrained` gets, as Python."""
    if recipe["bits"] == 8:
        return "BitsAndBytesConfig(load_in_8bit=True)"
    return f"""BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.{recipe["compute_dtype"]},
        bnb_4bit_use_double_quant={recipe["double_quant"]},
        bnb_4bit_quant_type="{recipe["quant_type"]}{recipe["bits"]}",
    )"""


def card_note(grid: Grid) -> str:
    """The note in the card on loading the folder."""
    if grid.bits == 8:
        return (
            "- bitsandbytes also rounds activations to 8 bits (LLM.int8), so outputs differ a little from those of "
            "the weights."
        )
    return """- On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward in evaluation mode,
  and training after that is wrong. `loftq.load_qlora` prevents it; with the lines above, set
  `module.support_avx512bf16_for_cpu = False` on every `Linear4bit` right after loading."""


def quantization_config(
    grid: Grid,
    compute_dtype: torch.dtype,
    skip_modules: Sequence[str],
    _codebooks: Mapping[str, str] | None = None,
    _target_modules: Sequence[str] = (),
    _target_parameters: Sequence[str] = (),
) -> dict[str, object]:
    """The entry of `config.json`. `skip_modules` replaces the library's defaults: it must list the head."""
    eight = grid.bits == 8
    return {
        "quant_method": METHOD,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": grid.double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip_modules),
        "llm_int8_threshold": 6.0,
    }


def _quant_state(shape: Sequence[int], grid: Grid, dtype: torch.dtype, offset: float) -> torch.Tensor:
    state: dict[str, object] = {
        "quant_type": grid.codebook,
        "blocksize": grid.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    text = json_text(state)
    if grid.double_quant:
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": 0}
        width = len(json_text(state)) + _OFFSET_WIDTH
        state["nested_offset"] = offset
        text = json_text(state).ljust(width)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
