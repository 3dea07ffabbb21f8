"""The 4-bit layout against bitsandbytes itself: what its Linear4bit saves, and what it reads back."""

from __future__ import annotations

import json
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from oracles import read_int8
from transformers import BitsAndBytesConfig

from loftq.core.codebooks import codebook, dynamic_map
from loftq.core.grid import ROW, Grid
from loftq.core.scales import NestedScales, Scales
from loftq.errors import OptionError
from loftq.formats import bitsandbytes as layout
from loftq.formats.layouts import choose

STATE = "m.weight.quant_state.bitsandbytes__nf4"
SHAPES = [(64, 64), (48, 192), (192, 5), (3, 64), (64, 1), (1, 128), (130, 320)]  # blocks that span rows, odd sides
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_of(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def ours(weight: torch.Tensor, grid: Grid) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of the layout, and what they stand for according to the quantizer: float32."""
    quantizer = grid.quantizer(weight.shape[1])
    codes, scales = quantizer.quantize(weight.float())
    found = layout.tensors("m", weight.shape, grid, weight.dtype, codes, scales)
    return found, quantizer.decode(codes, scales, weight.shape)


def theirs(weight: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """The state dict of a Linear4bit that bitsandbytes quantized on the CPU."""
    linear = Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4")
    linear.weight = Params4bit(
        weight,
        requires_grad=False,
        blocksize=grid.block_size,
        compress_statistics=grid.double_quant,
        quant_type="nf4",
        module=linear,
    )
    return torch.nn.ModuleDict({"m": linear.to("cpu")}).state_dict()


def state_of(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return json.loads(bytes(tensors[STATE].tolist()))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_are_what_linear4bit_saves(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, grid = weight_of(shape, dtype), Grid("nf4")
    found, _ = ours(weight, grid)
    expected = theirs(weight, grid)
    assert set(found) == set(expected)
    for name in set(found) - {STATE}:
        assert_same(found[name], expected[name])
    assert state_of(found) == state_of(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantization_has_linear4bits_tensors_and_nearest_codes(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, grid = weight_of(shape, dtype), Grid("nf4", double_quant=True)
    found, expected = ours(weight, grid)[0], theirs(weight, grid)
    assert set(found) == set(expected)
    for name in ("m.weight.quant_map", "m.weight.nested_quant_map"):
        assert_same(found[name], expected[name])
    # The mean of the scales is float64's here and float32's there, whose last bits depend on the processor.
    largest, theirs_largest = found["m.weight.nested_absmax"], expected["m.weight.nested_absmax"]
    torch.testing.assert_close(largest, theirs_largest, rtol=1e-6, atol=1e-8)
    state, theirs_state = state_of(found), state_of(expected)
    assert state.pop("nested_offset") == pytest.approx(theirs_state.pop("nested_offset"), rel=1e-6)
    assert state == theirs_state

    # The scales' codes: bitsandbytes' search on the CPU is not exact, so where the two differ ours is the nearer.
    absmax = weight.double().view(-1, 64).abs().amax(dim=1)
    spread = found["m.weight.nested_absmax"].repeat_interleave(256)[: len(absmax)]

    def missed_by(codes: torch.Tensor) -> torch.Tensor:
        return (absmax - state_of(found)["nested_offset"] - dynamic_map().double()[codes.int()] * spread).abs()

    codes, theirs_ = found["m.weight.absmax"], expected["m.weight.absmax"]
    assert_same(missed_by(codes) <= missed_by(theirs_) + 1e-8, torch.ones(len(absmax), dtype=torch.bool))
    assert int((codes != theirs_).sum()) <= max(1, len(codes) // 50)

    # The weight's codes: nearest under the scale that is read back, which bitsandbytes rounds only after choosing.
    read = loaded(found).quant_state
    scales = bnb.dequantize_blockwise(read.absmax, read.state2).double() + read.offset
    options = scales.view(-1, 1, 1) * codebook("nf4").double()  # (blocks, 1, levels)
    distances = (weight.double().view(-1, 64, 1) - options).abs()
    packed = found["m.weight"].view(-1)
    chosen = torch.stack([packed >> 4, packed & 15], dim=1).view(-1, 64, 1).long()
    assert bool((distances.gather(2, chosen) <= distances.amin(dim=2, keepdim=True) + 1e-7).all())


@pytest.mark.parametrize("block_size", [size for size in layout.BLOCK_SIZES if size != ROW])
def test_every_block_size_is_what_linear4bit_saves(block_size: int) -> None:
    weight, grid = weight_of((64, 128), torch.float32), Grid("nf4", block_size)
    found, expected = ours(weight, grid)[0], theirs(weight, grid)
    for name in set(expected) - {STATE}:
        assert_same(found[name], expected[name])
    assert state_of(found) == state_of(expected)


def loaded(tensors: dict[str, torch.Tensor]) -> Params4bit:
    """As transformers loads it: the weight, and everything whose name begins with the weight's."""
    stats = {name: tensor for name, tensor in tensors.items() if name != "m.weight"}
    return Params4bit.from_prequantized(tensors["m.weight"], stats, device="cpu")


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "block_size"), [*((shape, 64) for shape in SHAPES), ((64, 96), 32), ((64, 128), 4096)]
)
def test_reload_dequantizes_to_the_quantizers_values_bit_for_bit(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype, double_quant: bool
) -> None:
    found, decoded = ours(weight_of(shape, dtype), Grid("nf4", block_size, double_quant))
    parameter = loaded(found)
    assert (parameter.blocksize, parameter.quant_type, parameter.compress_statistics) == (
        block_size,
        "nf4",
        double_quant,
    )
    assert_same(bnb.dequantize_4bit(parameter.data, parameter.quant_state), decoded.to(dtype))


def test_scales_need_not_be_the_largest_magnitude() -> None:
    """What a search or another iterate leaves: the format holds any scale."""
    grid = Grid("nf4")
    quantizer = grid.quantizer(192)
    weight = weight_of((48, 192), torch.float32)
    scales = Scales(quantizer.scales(weight).values * 0.8)
    codes = quantizer.encode(weight, scales)
    parameter = loaded(layout.tensors("m", weight.shape, grid, torch.float32, codes, scales))
    rebuilt = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
    assert_same(rebuilt, quantizer.decode(codes, scales, weight.shape))


def test_a_zero_weight_reloads_as_zero() -> None:
    for double_quant in (False, True):
        found, _ = ours(torch.zeros(64, 64), Grid("nf4", double_quant=double_quant))
        parameter = loaded(found)
        assert not bnb.dequantize_4bit(parameter.data, parameter.quant_state).any()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_specs_foresee_the_tensors(shape: tuple[int, int], double_quant: bool) -> None:
    grid = Grid("nf4", double_quant=double_quant)
    found, _ = ours(weight_of(shape, torch.bfloat16), grid)
    specs = layout.specs("m", shape, grid, torch.bfloat16)
    assert [(spec.name, spec.dtype, spec.shape) for spec in specs] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()
    ]


# Float32 values with the longest decimals, as `Tensor.item` gives them.
@pytest.mark.parametrize(
    "offset", [0.0, 0.3333333432674408, 1.1754943508222875e-38, -1.401298464324817e-45, 3.4028234663852886e38]
)
def test_length_of_the_state_does_not_depend_on_the_offset(offset: float) -> None:
    grid = Grid("nf4", double_quant=True)
    nested = NestedScales(torch.zeros(64, dtype=torch.uint8), torch.zeros(1), offset)
    codes = torch.zeros(2048, dtype=torch.uint8)
    tensors = layout.tensors("m", (64, 64), grid, torch.bfloat16, codes, Scales(nested.decode(), nested))
    foreseen = {spec.name: spec.shape for spec in layout.specs("m", (64, 64), grid, torch.bfloat16)}
    assert tuple(tensors[STATE].shape) == foreseen[STATE]
    assert state_of(tensors)["nested_offset"] == offset
    assert loaded(tensors).quant_state.offset.item() == offset
    assert torch.equal(loaded(tensors).quant_state.state2.code, dynamic_map())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_config_is_what_transformers_writes(dtype: torch.dtype, double_quant: bool) -> None:
    skipped = ["lm_head", "model.layers.0.mlp.down_proj"]
    found = layout.quantization_config(Grid("nf4", double_quant=double_quant), dtype, skipped)
    expected = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=skipped,
    )
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(expected.to_dict()))
    read = BitsAndBytesConfig.from_dict(found)
    assert read.to_dict() == expected.to_dict()
    assert read.bnb_4bit_compute_dtype == dtype


@pytest.mark.parametrize("block_size", [16, 48, 63, 8192])
def test_block_sizes_that_bitsandbytes_has_not_are_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="invalid blocksize"):
        bnb.quantize_4bit(torch.ones(8192), blocksize=block_size, quant_type="nf4")
    with pytest.raises(OptionError, match=rf"block size {block_size}: use one of 32, 64, .*, 4096"):
        choose([Grid("nf4", block_size)], "bitsandbytes")


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_block_sizes_that_bitsandbytes_has_are_not(block_size: int) -> None:
    assert choose([Grid("nf4", block_size)], None) == "bitsandbytes"
    bnb.quantize_4bit(torch.ones(4096), blocksize=block_size, quant_type="nf4")


@pytest.mark.parametrize("shape", [(64, 64), (7, 24), (130, 320)])
def test_int8_is_what_bitsandbytes_saves_and_reads(shape: tuple[int, int]) -> None:
    """Oracle: the state dict of a Linear8bitLt, and its forward in the precision of the weights."""
    grid = Grid("int8", ROW, zero_point="symmetric")
    weight = weight_of(shape, torch.float16)
    found, decoded = ours(weight, grid)
    linear = Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False, threshold=6.0)
    linear.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    expected = torch.nn.ModuleDict({"m": linear}).state_dict()
    assert found.keys() == expected.keys()
    assert [(s.name, s.dtype, s.shape) for s in layout.specs("m", shape, grid, torch.float16)] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()
    ]
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
    torch.testing.assert_close(found["m.SCB"], expected["m.SCB"], rtol=1e-6, atol=0)
    apart = (found["m.weight"].int() - expected["m.weight"].int()).abs()
    assert int(apart.max()) <= 1  # theirs multiplies in float16
    assert float(apart.float().mean()) < 0.1
    torch.testing.assert_close(read_int8({"weight": found["m.weight"], "SCB": found["m.SCB"]}).float(), decoded)


def test_int8_config_is_what_transformers_writes() -> None:
    skipped = ["lm_head"]
    grid = Grid("int8", ROW, zero_point="symmetric")
    found = layout.quantization_config(grid, torch.bfloat16, skipped)
    read = BitsAndBytesConfig.from_dict(found)
    assert read.quantization_method() == "llm_int8"
    assert read.llm_int8_skip_modules == skipped
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(read.to_dict()))
