"""The kernels as Triton compiles them for a GPU, without one. What they compute, their callers' tests compare."""

from __future__ import annotations

import os

import pytest
from processes import run_python

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from loftq.core.kernels import gpu_rounding, gpu_trellis, gpu_unpack, gpu_viterbi

FLOATS, CODES = "*fp32", {"packed": "*u8", "codes": "*u8", "qweight": "*i32", "qzeros": "*i32", "groups": "*i32"}
NUMBERS = {"low": "fp32", "high": "fp32"}
SCALARS = "size count columns inputs outputs vectors first rows less start block".split()

def compile(kernel, pointers, constants):
    types = CODES | NUMBERS | dict.fromkeys(SCALARS, "i32") | dict.fromkeys(constants, "constexpr") | pointers
    names = {name: types.get(name, FLOATS) for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=names, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"enable_fp_fusion": False})
    assert "fma." not in made.asm["ptx"]
    assert made.asm["cubin"]

for bits, dtype in ((2, "*fp32"), (3, "*bf16"), (4, "*fp16"), (8, "*bf16")):
    written = {"scales": "*fp16", "shifts": "*fp16", "out": dtype}
    compile(gpu_unpack._stream, written, {"BITS": bits, "BLOCK": 64, "TILE": 2048})
    compile(gpu_unpack._words, written, {"BITS": bits, "INPUTS": 16, "OUTPUTS": 64})
streams = {"words": "*i32", "begins": "*i64", "widths": "*u8", "columns": "*fp16"}
tile = {"LENGTH": 12, "INPUTS": 8, "OUTPUTS": 256}
compile(gpu_trellis._decode, streams, tile)
for vectors, dtype in ((1, "*bf16"), (4, "*fp32")):
    compile(gpu_trellis._multiply, streams | {"x": dtype}, tile | {"SPAN": 128, "VECTORS": vectors})
    compile(gpu_trellis._multiply_back, streams | {"x": dtype, "out": dtype}, tile | {"TILES": 16, "VECTORS": vectors})
places = dict.fromkeys(("firsts", "counts", "starts", "stops"), "*i32") | {"before": "*u8", "states": "*i16"}
for width in (1, 2, 5):
    compile(gpu_viterbi._search, places, {"LONGEST": 129, "WIDTH": width, "LENGTH": 12, "RESET": 16})
for whole, boundaries in ((True, 0), (False, 4), (False, 16)):
    sizes = {"WHOLE": whole, "BOUNDARIES": boundaries, "WIDTH": 100, "LANES": 128, "ROWS": 16}
    compile(gpu_rounding._sweep, {}, sizes)
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int) -> None:
    """Oracle: Triton's compiler and ptxas. Nothing is fused: products are rounded as on the CPU."""
    pytest.importorskip("triton")
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = run_python(COMPILE, capability, level="torch", env=surroundings)
    assert done.returncode == 0, done.stderr
