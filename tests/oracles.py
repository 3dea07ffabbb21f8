"""Independent readers of what we write: a few lines of numpy, or the format's own library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from loftq.core.codebooks import CODEBOOKS, codebook, dynamic_map
from loftq.models.gptq_linear import GptqLinear


def read_packed(tensors: dict[str, torch.Tensor], name: str, block: int, shape: tuple[int, int]) -> torch.Tensor:
    """A weight of our own layout, from the tensors of its module as they lie on disk: float64."""
    bits = CODEBOOKS[name]
    block = shape[1] if block == -1 else block
    codes = read_stream(tensors["weight"].numpy(), bits, shape[0] * shape[1])
    scales = tensors["weight_scales"].numpy().astype(np.float64)
    if "weight_scales_absmax" in tensors:
        units = dynamic_map().numpy()[tensors["weight_scales"].numpy()]
        spread = np.repeat(tensors["weight_scales_absmax"].numpy(), 256)[: len(units)]
        scales = (units * spread + tensors["weight_scales_offset"].numpy()).astype(np.float64)
    levels = codebook(name).numpy().astype(np.float64)
    weight = levels[codes].reshape(-1, block) * scales[:, None]
    if "weight_zeros" in tensors:
        zeros = read_stream(tensors["weight_zeros"].numpy(), bits, len(scales))
        weight += ((2 ** (bits - 1) - zeros) * scales)[:, None]
    if "weight_shifts" in tensors:
        weight += tensors["weight_shifts"].numpy().astype(np.float64)[:, None]
    return torch.from_numpy(weight.reshape(shape))


def read_stream(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of a dense stream of bytes, low bits first."""
    found = np.unpackbits(stream, bitorder="little")[: count * bits]
    return (found.reshape(count, bits).astype(np.int64) << np.arange(bits)).sum(axis=1)


def read_gptq(tensors: dict[str, torch.Tensor], bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """A weight of GPTQ's layout, version 2, from the tensors of its module: float64."""
    rows, columns = shape
    codes = read_stream(tensors["qweight"].numpy().T.copy().view(np.uint8), bits, rows * columns).reshape(shape)
    scales = tensors["scales"].numpy().astype(np.float64)  # (groups, rows)
    zeros = read_stream(tensors["qzeros"].numpy().view(np.uint8), bits, scales.size).reshape(scales.shape)
    groups = tensors["g_idx"].numpy()
    return torch.from_numpy((codes - zeros[groups].T) * scales[groups].T)


def read_int8(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A weight of bitsandbytes' INT8, from the tensors of its module: float64."""
    return tensors["weight"].double() * tensors["SCB"].double().unsqueeze(1) / 127


def read_linear(layer: Any) -> torch.Tensor:
    """The weight that a loaded quantized linear stands for: float32, the exact product of level and scale."""
    if isinstance(layer, Linear8bitLt):
        scb = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return read_int8({"weight": layer.weight.data, "SCB": scb}).float()
    if isinstance(layer, Linear4bit):
        state = layer.weight.quant_state
        dtype, state.dtype = state.dtype, torch.float32
        weight = dequantize_4bit(layer.weight.data, state)
        state.dtype = dtype
        return weight
    tensors = {name: tensor.detach() for name, tensor in layer.state_dict().items() if name != "bias"}
    shape = (layer.out_features, layer.in_features)
    if isinstance(layer, GptqLinear):
        return read_gptq(tensors, layer.grid.bits, shape).float()
    return read_packed(tensors, layer.grid.codebook, layer.grid.block_size, shape).float()
