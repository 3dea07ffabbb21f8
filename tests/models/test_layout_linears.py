"""Every layout has the linears that it names.

Covers: loftq/models/bitsandbytes_linears.py, loftq/models/native_linears.py.
"""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
import torch
from torch import nn

from loftq.core.grid import ROW, Grid
from loftq.core.solvers.loftq import solve_loftq
from loftq.core.solvers.methods import METHODS
from loftq.core.solvers.trellis_coded import solve_trellis
from loftq.core.trellis import TrellisQuantizer
from loftq.formats.layouts import LAYOUTS
from loftq.models.layout_linears import LayoutLinears, linears_of, quantized_classes, read_weight

GRIDS = {
    "bitsandbytes": (Grid("nf4", 64), Grid("nf4", 64, True), Grid("int8", ROW, zero_point="symmetric")),
    "bitsandbytes-fsdp": (Grid("nf4", 64), Grid("nf4", 64, True)),
    "gptq": (Grid("int3", 32, zero_point="integer"),),
    "loftq": (Grid("nf2", 64), Grid("int3", 32, zero_point="float")),
    "loftq-trellis": (Grid("tcq2", ROW), Grid("tcq3.25", ROW), Grid("tcqfast2.25", ROW)),
}
MEMBERS = [name for name in vars(LayoutLinears) if not name.startswith("_")]


@pytest.mark.parametrize("format", LAYOUTS)
def test_a_layout_has_all_that_its_linears_must(format: str) -> None:
    """Oracle: the protocol's own members and their parameters."""
    linears, layout = linears_of(format), LAYOUTS[format]
    assert MEMBERS
    for name in MEMBERS:
        if name == "build":
            assert hasattr(linears, name) or not layout.IN_MEMORY
        if name != "build" or layout.IN_MEMORY:
            wanted = inspect.signature(getattr(LayoutLinears, name)).parameters
            assert list(inspect.signature(getattr(linears, name)).parameters) == list(wanted)[1:]
    assert all(issubclass(kind, nn.Module) for kind in linears.linear_classes())
    assert set(linears.linear_classes()) <= set(quantized_classes())
    if layout.PLUGIN is not None:
        import_module(layout.PLUGIN)
    else:
        assert layout.STOCK


@pytest.mark.parametrize(("format", "grid"), [(name, grid) for name, grids in GRIDS.items() for grid in grids], ids=str)
def test_a_weight_is_read_as_the_quantizer_decodes_it(format: str, grid: Grid) -> None:
    """Oracle: the quantizer's own decoding, and the forward pass of the linear that is built in memory."""
    assert set(GRIDS) == set(LAYOUTS)
    layout, dense = LAYOUTS[format], nn.Linear(64, 32, bias=False)
    quantizer = grid.decoder(64, layout.SCALE_DTYPE)
    weight = dense.weight.detach()
    if isinstance(quantizer, TrellisQuantizer):
        solution = solve_trellis(weight, quantizer, METHODS["loftq"], None, 2, 1, 1.0)
    else:
        solution = solve_loftq(weight, grid.quantizer(64, layout.SCALE_DTYPE), 2, 1, 1.0)
    decoded = quantizer.decode(solution.codes, solution.scales, dense.weight.shape)
    stored = layout.tensors("m", (32, 64), grid, torch.float32, solution.codes, solution.scales)
    weight = read_weight(format, "m", (32, 64), grid, stored.__getitem__)
    torch.testing.assert_close(weight, decoded, rtol=1e-5, atol=1e-6)
    assert layout.input_groups("m", (32, 64), grid, stored.__getitem__) is None
    if layout.IN_MEMORY:
        built = linears_of(format).build(dense, grid, solution, None)
        assert isinstance(built, linears_of(format).linear_classes())
        out = built(torch.eye(64)).T
        assert (out - decoded).norm() < 0.02 * decoded.norm()  # LLM.int8 rounds the inputs
