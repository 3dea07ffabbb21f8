"""Checkpoints of compressed-tensors (llm-compressor), read as dense tensors, one at a time.

Three of its formats are read, for a linear (out, in):

    pack-quantized    X.weight_packed int32, X.weight_scale, X.weight_shape, X.weight_zero_point, X.weight_g_idx
                      (layout: `compressed_tensors`)
    int-quantized     X.weight int8, X.weight_scale, X.weight_zero_point
    float-quantized   X.weight float8, X.weight_scale

Scales are (out, groups), (out, 1), or one for all; those of blocks are (out / b, in / c). The values are computed in
float32 and rounded to the dtype of the scales, as the package does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from loftq.core.packing import unpack
from loftq.errors import CheckpointError
from loftq.formats.checkpoint import Checkpoint, TensorSpec
from loftq.formats.prequantized import Decoder, DenseView

Reader = Callable[[str], torch.Tensor]
_PACKED, _WHOLE = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale")


def compressed_view(checkpoint: Checkpoint, quantization: Mapping[str, Any], dtype: torch.dtype) -> DenseView:
    """The dense view of a checkpoint. Raises CheckpointError for a format that cannot be read."""
    groups = (quantization.get("config_groups") or {}).values()
    formats = {str(group.get("format") or quantization.get("format")) for group in groups} or {"none"}
    unknown = sorted(formats - {_PACKED, *_WHOLE})
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder} has the format {unknown[0]} of compressed-tensors, which cannot be read: expected "
            f"{', '.join([_PACKED, *_WHOLE])}"
        )
    bits = {int(group["weights"]["num_bits"]) for group in groups if group.get("weights")}
    tensors: dict[str, TensorSpec] = {}
    decoded: dict[str, Decoder] = {}
    for name, spec in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        scale = checkpoint.tensors.get(f"{module}.weight_scale")
        weight = f"{module}.weight"
        if last == "weight_packed":
            shape = tuple(checkpoint.read(f"{module}.weight_shape").tolist())
            width = spec.numel * 32 // (shape[0] * shape[1]) if len(bits) != 1 else next(iter(bits))
            tensors[weight] = TensorSpec(weight, dtype if scale is None else scale.dtype, shape)
            decoded[weight] = partial(_decode_packed, module, shape, width)
        elif last == "weight" and scale is not None and spec.dtype.itemsize == 1:
            tensors[name] = TensorSpec(name, dtype, spec.shape)
            decoded[name] = partial(_decode_whole, module)
        elif last not in (*_PARTS, *_UNUSED):
            tensors[name] = spec
    title = f"compressed-tensors, {', '.join(sorted(formats))}"
    return DenseView(checkpoint.folder, tensors, checkpoint.files, stored=checkpoint, title=title, decoded=decoded)


def _decode_packed(module: str, shape: tuple[int, int], bits: int, read: Reader) -> torch.Tensor:
    rows, columns = shape
    packed = read(f"{module}.weight_packed").contiguous()  # (out, words): a row may end within a word
    per_row = packed.shape[1] * 32 // bits
    codes = unpack(packed.view(-1).view(torch.uint8), bits, rows * per_row).view(rows, per_row)[:, :columns].float()
    scales = read(f"{module}.weight_scale").float()
    zeros = _optional(read, f"{module}.weight_zero_point")
    middle = 2.0 ** (bits - 1)
    if zeros is not None:
        words = zeros.t().contiguous()  # (groups, words): a stream along the outputs
        per_group = words.shape[1] * 32 // bits
        stream = unpack(words.view(-1).view(torch.uint8), bits, len(words) * per_group)
        zeros = stream.view(len(words), per_group)[:, :rows].t().float()
    at = _groups(read, module, columns, scales.shape[-1])
    offset = middle if zeros is None else zeros[:, at]
    return (codes - offset) * scales[:, at]


def _decode_whole(module: str, read: Reader) -> torch.Tensor:
    codes, scales = read(f"{module}.weight").float(), read(f"{module}.weight_scale").float()
    rows, columns = codes.shape
    zeros = _optional(read, f"{module}.weight_zero_point")
    if scales.dim() < 2:
        scales = scales.view(-1, 1)
    down = torch.arange(rows) // -(-rows // len(scales))
    at = _groups(read, module, columns, scales.shape[1])
    if zeros is not None:
        codes -= zeros.float().view(scales.shape)[down][:, at]
    return codes * scales[down][:, at]


def _groups(read: Reader, module: str, columns: int, count: int) -> torch.Tensor:
    """The group of each input: as the checkpoint says, or else of consecutive inputs."""
    named = _optional(read, f"{module}.weight_g_idx")
    if named is not None and bool((named >= 0).all()):
        return named.long()
    return torch.arange(columns) // -(-columns // count)


def _optional(read: Reader, name: str) -> torch.Tensor | None:
    """A tensor that a checkpoint may have."""
    try:
        return read(name)
    except KeyError:
        return None
