"""MLX's affine layout, as `mlx_lm.load` reads it from a folder: integers in groups, with any bias.

For a linear (out, in) of b bits in groups of g consecutive inputs (mlx.core.quantize, mode `affine`):

    weight    uint32  (out, in · b / 32)   codes; along each row a dense stream with low bits first
    scales    float32 (out, in / g)
    biases    float32 (out, in / g)        what a code of 0 stands for
    bias      the linear's own, where it has one: dense, beside these

    W~ = scale · code + bias

Tensors are named as in the transformers checkpoint. `config.json` names the width and the group under `quantization`;
mlx-lm writes a second copy under `quantization_config`, which the Hub and other readers look at, and so is done here.
Of the rotary embedding, `rope_parameters` of transformers 5 is said once more as `rope_theta` and `rope_scaling`: most
models of mlx-lm read these alone, and fall back on a default without a word.

Scales and biases are float32, where mlx itself would write the checkpoint's own 16 bits. A bias is as large as
2^(b−1) steps of the grid: rounding it to bfloat16 would move the weights by up to 1/32 of a step at 4 bits and half a
step at 8, and rounding is what a merge into biases avoids. mlx multiplies in the widest of its operands' types, so
activations are float32 from the first quantized linear on, whatever the type of the dense tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from loftq.core.affine import AffineWeight
from loftq.core.packing import pack
from loftq.errors import OptionError
from loftq.formats.checkpoint import TensorSpec

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_DTYPE = torch.float32
METADATA = {"format": "mlx"}  # of each shard, as mlx-lm writes it


def check_linears(bits: int, group_size: int) -> None:
    """Raise OptionError for codes that have no place in this format."""
    if bits not in BITS:
        raise OptionError(f"--to mlx holds integers of {_listed(BITS)} bits, not of {bits}: quantize to one of these")
    if group_size not in GROUP_SIZES:
        raise OptionError(
            f"--to mlx holds groups of {_listed(GROUP_SIZES)} inputs, not of {group_size}: "
            f"quantize with --group-size {GROUP_SIZES[1]}"
        )


def specs(module: str, shape: Sequence[int], bits: int, group_size: int) -> list[TensorSpec]:
    """The tensors of one linear (out, in). Raises OptionError where groups do not divide its inputs."""
    rows, columns = shape
    if columns % group_size:
        raise OptionError(
            f"{module}: groups of {group_size} do not divide its {columns} inputs: use a --group-size that does"
        )
    groups = (rows, columns // group_size)
    return [
        TensorSpec(f"{module}.weight", torch.uint32, (rows, columns * bits // 32)),
        TensorSpec(f"{module}.scales", SCALE_DTYPE, groups),
        TensorSpec(f"{module}.biases", SCALE_DTYPE, groups),
    ]


def tensors(module: str, weight: AffineWeight) -> dict[str, torch.Tensor]:
    """The named tensors of one linear."""
    stream = pack(weight.codes.reshape(-1), weight.bits)  # rows fill whole words: groups are of 32 codes or more
    return {
        f"{module}.weight": stream.view(torch.uint32).view(len(weight.codes), -1),
        f"{module}.scales": weight.scales.to(SCALE_DTYPE),
        f"{module}.biases": weight.biases.to(SCALE_DTYPE),
    }


def config(
    source: Mapping[str, object], bits: int, group_size: int, widths: Mapping[str, int] | None = None
) -> dict[str, object]:
    """`config.json` of the export, from that of the quantized model.

    `widths` has the bits of each module that is not of `bits`.
    """
    entry: dict[str, object] = _entry(bits, group_size)
    entry |= {module: _entry(other, group_size) for module, other in (widths or {}).items()}
    return {**_rope(source), **source, "quantization": entry, "quantization_config": entry}


def _rope(source: Mapping[str, object]) -> dict[str, object]:
    """The rotary embedding where mlx-lm's models look for it, which is not where transformers 5 writes it."""
    rope = source.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}
    rotary = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaled = rope.get("rope_type", "default") != "default"
    return rotary | ({"rope_scaling": {**rope, "type": rope["rope_type"]}} if scaled else {})


def _entry(bits: int, group_size: int) -> dict[str, object]:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
