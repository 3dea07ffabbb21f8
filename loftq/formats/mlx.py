"""MLX's affine layout, as `mlx_lm.load` reads it: integers in groups that have a scale and a bias each.

For a linear (out, in) of b bits in groups of g consecutive inputs (mlx.core.quantize, mode `affine`):

    weight    uint32  (out, in · b / 32)   codes; each row is a dense stream, low bits first
    scales    float32 (out, in / g)
    biases    float32 (out, in / g)        the value of code 0
    bias      (out,)                       the bias of the linear itself, if it has one; dense

    W~ = scale · code + bias

Tensors have the names of the transformers checkpoint. `config.json` gives the width and the group size under
`quantization`, and again under `quantization_config`, which the Hub and other readers look at; mlx-lm does the same.
The rotary embedding has its old names too (`model_config.with_old_names`).

Scales and biases are float32, although mlx itself would write them in the 16-bit type of the checkpoint. A bias is as
large as 2^(b−1) steps of the grid. Rounding it to bfloat16 would move the weights by up to 1/32 of a step at 4 bits,
and half a step at 8 bits. A merge into biases is meant to avoid exactly this rounding. mlx multiplies in the widest
type of its operands, so activations are float32 after the first quantized linear, even if dense tensors are bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from loftq.core.affine import AffineWeight
from loftq.core.packing import pack
from loftq.errors import OptionError
from loftq.formats.checkpoint import TensorSpec
from loftq.formats.model_config import with_old_names

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_DTYPE = torch.float32
METADATA = {"format": "mlx"}  # in the header of each shard, as mlx-lm writes it


def check_linears(bits: int, group_size: int) -> None:
    """Raise OptionError for a width or a group size that this format cannot hold."""
    if bits not in BITS:
        raise OptionError(f"--to mlx holds integers of {_listed(BITS)} bits, not {bits}: quantize to one of these")
    if group_size not in GROUP_SIZES:
        raise OptionError(
            f"--to mlx holds groups of {_listed(GROUP_SIZES)} inputs, not {group_size}: "
            f"quantize with --group-size {GROUP_SIZES[1]}"
        )


def specs(module: str, shape: Sequence[int], bits: int, group_size: int) -> list[TensorSpec]:
    """The tensors of one linear (out, in). Raises OptionError if the group size does not divide its inputs."""
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
    """Make the `config.json` of the export from that of the quantized model.

    `widths` has the bits of each module whose width is not `bits`.
    """
    entry: dict[str, object] = _entry(bits, group_size)
    entry |= {module: _entry(other, group_size) for module, other in (widths or {}).items()}
    return {**with_old_names(source), "quantization": entry, "quantization_config": entry}


def _entry(bits: int, group_size: int) -> dict[str, object]:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
