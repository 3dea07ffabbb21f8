"""Block quantization against bitsandbytes, byte for byte, and against brute force in float64.

Covers: loftq/core/grid.py, loftq/core/scales.py, loftq/core/kernels/blocks.py, loftq/core/kernels/dispatch.py.
"""

from collections.abc import Callable

import bitsandbytes.functional as bnb
import pytest
import torch

from loftq.core.blockwise import BlockQuantizer
from loftq.core.codebooks import TABLES
from loftq.core.kernels import blocks, dispatch
from loftq.core.scales import NestedScales, Scales
from loftq.errors import OptionError

THREADED = 4100  # blocks: just enough for the kernels to share them out among threads
BLOCK_SIZES = [32, 64, 128, 4096]
pytestmark = pytest.mark.usefixtures("set_threads")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows from 1e-8 to 10 in size, and one of zeros: scales that 8 bits show as next to nothing, or below zero."""
    weight = gaussian(*shape, seed=seed) * torch.logspace(-8, 1, shape[0]).unsqueeze(1)
    weight[shape[0] // 2] = 0
    return weight


def unpack(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([codes >> 4, codes & 15], dim=1).view(-1)


def pack(codes: torch.Tensor) -> torch.Tensor:
    high, low = codes.to(torch.uint8).view(-1, 2).unbind(1)
    return high << 4 | low


def read_scales(nested: NestedScales) -> torch.Tensor:
    """The scales that bitsandbytes' own reader of nested statistics obtains."""
    levels = bnb.dequantize_blockwise(nested.codes, absmax=nested.absmax, code=bnb.create_dynamic_map(), blocksize=256)
    return levels + torch.tensor(nested.offset)


def read_weight(codes: torch.Tensor, scales: Scales, block_size: int, shape: torch.Size) -> torch.Tensor:
    """bitsandbytes' own float32 dequantization of our codes, nested statistics and all.

    Read as one long row: its CPU kernel (0.50.2) starts a block at every row, against its own quantizer and GPUs.
    """
    flat = torch.Size([1, shape.numel()])
    state = bnb.QuantState(scales.values, shape=flat, dtype=torch.float32, blocksize=block_size, quant_type="nf4")
    if scales.nested:
        state.absmax, state.offset = scales.nested.codes, torch.tensor(scales.nested.offset)
        state.state2 = bnb.QuantState(
            scales.nested.absmax, code=bnb.create_dynamic_map(), blocksize=256, dtype=torch.float32
        )
        state.nested = True
    with torch.compiler.set_stance("force_eager"):  # for large blocks bitsandbytes would compile for 20 s
        return bnb.dequantize_4bit(codes.unsqueeze(1), state).view(shape)


def wide_blocks(block_size: int) -> list[tuple[int, int]]:
    """One block; rows that end inside blocks; and, where that stays small, enough blocks for the threads."""
    return [(1, block_size), (block_size, 80)] + [(THREADED, block_size)] * (block_size <= 128)


NF4_CASES = [(block_size, shape) for block_size in BLOCK_SIZES for shape in wide_blocks(block_size)]


@pytest.mark.parametrize("born", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block_size", "shape"), NF4_CASES)
def test_nf4_codes_and_scales_are_bitsandbytes_bytes(
    block_size: int, shape: tuple[int, int], born: torch.dtype
) -> None:
    weight = gaussian(*shape).to(born)
    expected, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    codes, scales = BlockQuantizer("nf4", block_size).quantize(weight.float())
    assert torch.equal(codes, expected.view(-1))
    assert torch.equal(scales.values, state.absmax)


def test_values_on_a_boundary_are_bitsandbytes_bytes() -> None:
    """Midpoints between levels, and the floats on either side of them: they round as in bitsandbytes."""
    quantizer = BlockQuantizer("nf4")
    midpoints = (quantizer.levels[1:] + quantizer.levels[:-1]) / 2
    around = [midpoints.nextafter(torch.tensor(toward)) for toward in (-2.0, 2.0)]
    weight = torch.cat([midpoints, *around, torch.ones(19)]).view(1, 64)
    expected, _ = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, scales = quantizer.quantize(weight)
    assert torch.equal(codes, expected.view(-1))

    residual = torch.empty_like(weight)
    quantizer.residual(weight, None, residual)
    assert torch.equal(residual, weight - quantizer.decode(codes, scales, weight.shape))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("block_size", "shape"), NF4_CASES)
def test_nf4_decodes_to_bitsandbytes_bits(block_size: int, shape: tuple[int, int], double_quant: bool) -> None:
    quantizer = BlockQuantizer("nf4", block_size, double_quant)
    weight = gaussian(*shape)
    codes, scales = quantizer.quantize(weight)
    decoded = quantizer.decode(codes, scales, weight.shape)
    assert torch.equal(decoded, read_weight(codes, scales, block_size, weight.shape))


@pytest.mark.parametrize("weight", [gaussian(16, 80), uneven(64, 320), gaussian(THREADED, 64)], ids=lambda w: w.numel())
def test_double_quantized_scales_are_what_bitsandbytes_reads(weight: torch.Tensor) -> None:
    scales = BlockQuantizer("nf4", double_quant=True).scales(weight)
    assert torch.equal(scales.values, read_scales(scales.nested))


def test_double_quantized_scales_are_as_near_as_bitsandbytes_own() -> None:
    weight = gaussian(512, 512)
    absmax = BlockQuantizer("nf4").scales(weight).values
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    ours = BlockQuantizer("nf4", double_quant=True).scales(weight).values
    assert (ours - absmax).norm() <= 1.0001 * (theirs - absmax).norm()


@pytest.mark.parametrize("kind", ["absmax", "double", "given"])
@pytest.mark.parametrize("name", TABLES)
def test_codes_are_nearest_by_brute_force_in_float64(name: str, kind: str) -> None:
    """Under the scales that will be read, also where they are not the block's largest magnitude.

    A value on a midpoint to the last bit of a float may go either way: 2 of 20,480 are allowed to.
    """
    weight = uneven(64, 320)
    quantizer = BlockQuantizer(name, double_quant=kind == "double")
    scales = quantizer.scales(weight)
    if kind == "given":
        scales = Scales(scales.values * torch.linspace(0.4, 1.05, len(scales.values)))
    chosen = unpack(quantizer.encode(weight, scales)).long().unsqueeze(1)

    levels = quantizer.levels.double() * scales.values.double().repeat_interleave(64).unsqueeze(1)  # (values, levels)
    distances = (levels - weight.double().view(-1, 1)).abs()
    excess = distances.gather(1, chosen).squeeze(1) - distances.amin(1)
    assert int((excess > 0).sum()) <= 2
    assert bool((excess <= 1e-6 * weight.abs().view(-1)).all())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", [(64, 80), (THREADED, 64)])
def test_residual_is_weight_less_its_rounding(
    shape: tuple[int, int], name: str, double_quant: bool, corrected: bool, in_place: bool
) -> None:
    """Oracle: `W − decode(encode(W − C))` in separate steps, and its squared norm in float64."""
    weight, correction = gaussian(*shape), 0.1 * gaussian(*shape, seed=1)
    quantizer = BlockQuantizer(name, double_quant=double_quant)
    codes, scales = quantizer.quantize(weight - correction if corrected else weight)
    expected = weight - quantizer.decode(codes, scales, weight.shape)

    out = correction if in_place else torch.full_like(weight, torch.nan)
    squared = quantizer.residual(weight, correction if corrected else None, out)
    assert torch.equal(out, expected)
    assert squared == pytest.approx(float(expected.double().square().sum()), rel=1e-6)


def test_residual_under_given_scales() -> None:
    """Oracle: `W − decode(encode(W))` under the same scales."""
    weight, out = gaussian(64, 80), torch.empty(64, 80)
    quantizer = BlockQuantizer("nf3")
    scales = Scales(0.8 * quantizer.scales(weight).values)
    quantizer.residual(weight, None, out, scales)
    assert torch.equal(out, weight - quantizer.decode(quantizer.encode(weight, scales), scales, weight.shape))


def everything(quantizer: BlockQuantizer, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that a quantizer says of a weight and of what a correction leaves of it."""
    correction = 0.1 * weight.flip(0)
    codes, scales = quantizer.quantize(weight)
    residual = torch.empty_like(weight)
    squared = quantizer.residual(weight, correction, residual)
    return {
        "codes": codes,
        "scales": scales.values,
        "corrected scales": quantizer.scales(weight, correction).values,
        "codes under given scales": quantizer.encode(weight, Scales(0.9 * scales.values)),
        "decoded": quantizer.decode(codes, scales, weight.shape),
        "residual": residual,
        "squared": torch.tensor(squared),
        "norm": torch.tensor(blocks.squared_norm(weight, quantizer.block_size)),
    }


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_torch_path_equals_compiled_path(
    name: str, double_quant: bool, block_size: int, request: pytest.FixtureRequest
) -> None:
    """Oracle: the compiled loops. Everything to the last bit but sums, whose order is free."""
    quantizer = BlockQuantizer(name, block_size, double_quant)
    weight = uneven(64, 1024)
    compiled = everything(quantizer, weight)
    request.getfixturevalue("torch_path")
    for what, value in everything(quantizer, weight).items():
        if what == "squared":
            torch.testing.assert_close(value, compiled[what], rtol=1e-6, atol=0)
        else:
            assert torch.equal(value, compiled[what]), what


@pytest.mark.parametrize("double_quant", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(double_quant: bool, set_threads: Callable[[int], None]) -> None:
    """Oracle: one thread. 65,536 blocks, which three threads share unevenly."""
    quantizer = BlockQuantizer("nf4", 32, double_quant)
    weight = gaussian(1024, 2048)
    set_threads(1)
    alone = everything(quantizer, weight)
    for count in (2, 3):
        set_threads(count)
        for what, value in everything(quantizer, weight).items():
            assert torch.equal(value, alone[what]), f"{what} on {count} threads"


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("nonzero", [0, 1, 63])
def test_blocks_of_zeros_stay_zeros(
    nonzero: int, name: str, double_quant: bool, path: str, request: pytest.FixtureRequest
) -> None:
    if path == "torch":
        request.getfixturevalue("torch_path")
    weight = torch.zeros(64, 128)
    weight[:nonzero] = gaussian(64, 128)[:nonzero]
    quantizer = BlockQuantizer(name, double_quant=double_quant)
    codes, scales = quantizer.quantize(weight)
    decoded, residual = quantizer.decode(codes, scales, weight.shape), torch.empty_like(weight)
    squared = quantizer.residual(weight, None, residual)
    assert bool(decoded.isfinite().all())
    assert not decoded[nonzero:].any()
    assert torch.equal(residual, weight - decoded)
    assert (squared == 0) == (nonzero == 0)


def test_blocks_of_subnormal_numbers_are_bitsandbytes_bytes() -> None:
    weight = gaussian(4, 64) * 1e-40
    weight[:, ::3] = 0
    expected, _ = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(BlockQuantizer("nf4").quantize(weight)[0], expected.view(-1))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", TABLES)
def test_representable_weights_survive_bit_for_bit(name: str, block_size: int) -> None:
    """Oracle: the codes and scales that the weight was made of."""
    generator = torch.Generator().manual_seed(0)
    quantizer = BlockQuantizer(name, block_size)
    codes = torch.randint(len(quantizer.levels), (48, block_size), generator=generator)
    codes[::2, 5], codes[1::2, 7] = 0, len(quantizer.levels) - 1  # each block reaches -1 or 1 times its scale
    scales = Scales(torch.rand(48, generator=generator) + 1e-3)
    weight = quantizer.decode(pack(codes), scales, torch.Size([48, block_size]))

    again, absmax = quantizer.quantize(weight)
    assert torch.equal(absmax.values, scales.values)
    assert torch.equal(unpack(again), codes.view(-1).to(torch.uint8))
    assert torch.equal(quantizer.decode(again, absmax, weight.shape), weight)
    assert quantizer.residual(weight, None, torch.empty_like(weight)) == 0


def test_blocks_that_do_not_divide_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same weight in one chunk."""
    quantizer = BlockQuantizer("nf4", 96)
    weight = gaussian(96, 96)
    codes, scales = quantizer.quantize(weight)
    whole = quantizer.decode(codes, scales, weight.shape)
    monkeypatch.setattr(dispatch, "CHUNK", 1000)
    assert torch.equal(quantizer.decode(codes, scales, weight.shape), whole)


@pytest.mark.parametrize("block_size", [0, -64, 4, 100])
def test_block_sizes_that_the_loops_cannot_take_are_refused(block_size: int) -> None:
    with pytest.raises(OptionError, match=f"block size {block_size} is not a multiple of 8"):
        BlockQuantizer("nf4", block_size)
