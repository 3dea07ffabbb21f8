"""Independent readers of what we write: a few lines of numpy, or the format's own library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from loftq.core.codebooks import CODEBOOKS, codebook, dynamic_map


def read_packed(tensors: dict[str, torch.Tensor], name: str, block: int, shape: tuple[int, int]) -> torch.Tensor:
    """A weight of our own layout, from the tensors of its module as they lie on disk: float64."""
    bits = CODEBOOKS[name]
    count = shape[0] * shape[1]
    stream = np.unpackbits(tensors["weight"].numpy(), bitorder="little")[: count * bits]
    codes = (stream.reshape(count, bits) << np.arange(bits)).sum(axis=1)
    scales = tensors["weight_scales"].numpy().astype(np.float64)
    if "weight_scales_absmax" in tensors:
        units = dynamic_map().numpy()[tensors["weight_scales"].numpy()]
        spread = np.repeat(tensors["weight_scales_absmax"].numpy(), 256)[: len(units)]
        scales = (units * spread + tensors["weight_scales_offset"].numpy()).astype(np.float64)
    levels = codebook(name).numpy().astype(np.float64)
    return torch.from_numpy((levels[codes].reshape(-1, block) * scales[:, None]).reshape(shape))


def read_linear(layer: Any) -> torch.Tensor:
    """The weight that a loaded quantized linear stands for: float32, the exact product of level and scale."""
    if isinstance(layer, Linear4bit):
        state = layer.weight.quant_state
        dtype, state.dtype = state.dtype, torch.float32
        weight = dequantize_4bit(layer.weight.data, state)
        state.dtype = dtype
        return weight
    tensors = {name: tensor.detach() for name, tensor in layer.state_dict().items() if name != "bias"}
    return read_packed(tensors, layer.codebook, layer.block_size, (layer.out_features, layer.in_features)).float()
