"""The tensors of quantized linears, by their names alone.

Oracle: the tensors that each layout says it writes.
"""

from __future__ import annotations

import pytest
import torch

from loftq.artifacts.quantized_linears import QuantizedLinears
from loftq.core.grid import ROW, Grid
from loftq.errors import ArtifactError
from loftq.formats.layouts import LAYOUTS

GRIDS = {
    "bitsandbytes": (Grid("nf4"), Grid("nf4", double_quant=True), Grid("int8", ROW, zero_point="symmetric")),
    "bitsandbytes-fsdp": (Grid("nf4"), Grid("nf4", double_quant=True)),
    "gptq": (Grid("int4", 32, zero_point="integer"),),
    "loftq": (Grid("nf2"), Grid("nf3", double_quant=True), Grid("int2", 32, zero_point="float")),
    "loftq-trellis": (Grid("tcq2"), Grid("tcqfast2.25")),
}
OTHERS = (
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.0.up.bias",
    "model.layers.0.up_norm.weight",
    "model.layers.0.experts.gate_up_proj_bias",
)


def expected_of(format: str, grid: Grid, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    layout = LAYOUTS[format]
    return {
        spec.name: module
        for module, shape in shapes.items()
        for spec in layout.specs(module, shape, grid, torch.bfloat16)
    }


@pytest.mark.parametrize("format", LAYOUTS)
def test_they_are_those_that_the_layout_writes(format: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"model.layers.0.up": (128, 64), "model.layers.1.up": (128, 64)}
    if LAYOUTS[format].EXPERTS:
        shapes["model.layers.0.experts.gate_up_proj"] = (4, 128, 64)
    for grid in GRIDS[format]:
        expected = expected_of(format, grid, shapes)
        linears = QuantizedLinears(dict.fromkeys(shapes, grid), shapes)
        assert linears.tensors([*expected, *OTHERS]) == expected


def test_a_tensor_that_is_missing_is_named() -> None:
    shapes = {"model.layers.0.up": (128, 64), "model.layers.1.up": (128, 64)}
    names = set(expected_of("bitsandbytes", Grid("nf4"), dict(shapes)))
    linears = QuantizedLinears(dict.fromkeys(shapes, Grid("nf4")), shapes)
    with pytest.raises(ArtifactError, match=r"the tensor 'model\.layers\.1\.up\.weight\.absmax' is missing"):
        linears.tensors(names - {"model.layers.1.up.weight.absmax"})
    with pytest.raises(ArtifactError, match=r"the tensor 'model\.layers\.0\.up\.weight\b"):
        linears.tensors(name for name in names if "layers.1" in name)
