"""GPTQ's layout against an independent reading, and what each format holds."""

from __future__ import annotations

import pytest
import torch
from oracles import read_gptq

from loftq.core.grid import ROW, Grid
from loftq.errors import OptionError
from loftq.formats import gptq
from loftq.formats.layouts import LAYOUTS, choose, misfit
from loftq.models.gptq_quantizer import GptqConfig

SHAPES = [(32, 32, ROW), (64, 96, 32), (96, 128, 64), (32, 64, 16), (160, 256, 128)]


@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_the_tensors_read_back(rows: int, columns: int, group: int, bits: int, zero: str) -> None:
    """Oracle: numpy's reading of the words by the published layout, against what the quantizer made."""
    grid = Grid(f"int{bits}", group, zero_point=zero)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) + 0.3
    quantizer = grid.quantizer(columns, torch.float16)
    codes, scales = quantizer.quantize(weight)
    found = gptq.tensors("m", weight.shape, grid, torch.bfloat16, codes, scales)
    assert [(s.name, s.dtype, s.shape) for s in gptq.specs("m", weight.shape, grid, torch.bfloat16)] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()
    ]
    assert all(tensor.is_contiguous() for tensor in found.values())
    own = {name.removeprefix("m."): tensor for name, tensor in found.items()}
    assert torch.equal(read_gptq(own, bits, (rows, columns)).float(), quantizer.decode(codes, scales, weight.shape))


def test_a_word_by_hand() -> None:
    """One column of 3-bit codes 0, 1, …, 7, 0, … : 32 of them in three words, the eleventh across two."""
    codes = torch.arange(32, dtype=torch.uint8) % 8
    weight = codes.float().repeat(32, 1) - 3  # (32, 32)
    grid = Grid("int3", ROW, zero_point="integer")
    found = gptq.tensors("m", weight.shape, grid, torch.float16, *grid.quantizer(32, torch.float16).quantize(weight))
    stream = sum(code << (3 * i) for i, code in enumerate(codes.tolist()))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(3)]
    assert [word & 0xFFFFFFFF for word in found["m.qweight"][:, 5].tolist()] == words
    zeros = sum(3 << (3 * i) for i in range(32))
    assert [word & 0xFFFFFFFF for word in found["m.qzeros"][0].tolist()] == [
        (zeros >> (32 * i)) & 0xFFFFFFFF for i in range(3)
    ]
    assert found["m.scales"].unique().tolist() == [1.0]


@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize(
    ("modules", "within"),
    [
        (["model.layers.0.q_proj", "model.layers.1.q_proj"], "model.layers"),
        (["encoder.block.0.wi", "decoder.block.0.wi"], ""),
        (["bert.encoder.layer.0.attention.self.query"], "bert.encoder.layer"),
    ],
)
def test_the_config_is_one_that_transformers_reads(modules: list[str], within: str, zero: str) -> None:
    grid = Grid("int3", 64, zero_point=zero)
    found = gptq.quantization_config(grid, torch.float16, ["lm_head"], dict.fromkeys(modules, "int3"), ["q_proj"])
    read = GptqConfig.from_dict(found)
    assert (read.bits, read.group_size, read.sym, read.desc_act) == (3, 64, zero == "symmetric", False)
    assert read.format == "gptq_v2"
    assert read.block_name_to_quantize == within
    assert read.modules_in_block_to_quantize == [["q_proj"]]


@pytest.mark.parametrize(
    ("grid", "format"),
    [
        (Grid("nf4"), "bitsandbytes"),
        (Grid("nf4", double_quant=True), "bitsandbytes"),
        (Grid("nf3"), "loftq"),
        (Grid("int8", ROW, zero_point="symmetric"), "bitsandbytes"),
        (Grid("int8", ROW, zero_point="integer"), "gptq"),
        (Grid("int8", 64, zero_point="symmetric"), "gptq"),
        (Grid("int3", 64, zero_point="integer"), "gptq"),
        (Grid("int3", 64, zero_point="float"), "loftq"),
        (Grid("int3", 64, True, "integer"), "loftq"),
    ],
)
def test_the_first_format_that_holds_a_type(grid: Grid, format: str) -> None:
    assert choose([grid], None) == format
    assert choose([grid], format) == format
    assert choose([grid], "loftq") == "loftq"
    assert choose([grid], None, loadable=["loftq"]) == "loftq"
    assert choose([Grid("nf2"), grid], None) == "loftq"


def test_gptq_packs_words() -> None:
    grid = Grid("int4", 8 * 3, zero_point="integer")
    assert choose([Grid("int4", 32, zero_point="integer")], None, shapes=[(32, 64), (40, 64)]) == "loftq"
    assert "both sides to be multiples of 32" in str(misfit("gptq", grid, 40, 96))
    assert "--group-size 64 does not divide its 96 inputs: use --group-size 32" in str(
        misfit("gptq", Grid("int4", 64), 32, 96)
    )
    assert "not a multiple of 8" in str(misfit("loftq", Grid("int4", ROW), 32, 36))
    assert misfit("loftq", Grid("int4", ROW), 32, 40) is None


@pytest.mark.parametrize(
    ("grid", "format", "said"),
    [
        (Grid("nf2"), "bitsandbytes", "holds nf4 in blocks, .*, not nf2: use --format loftq"),
        (Grid("nf4"), "gptq", "not nf4: use --format bitsandbytes or loftq"),
        (Grid("int4", 64, zero_point="float"), "gptq", "not int4 with float zero-points: use --format loftq"),
        (Grid("int4", 64, True, "integer"), "gptq", "doubly quantized: use --format loftq"),
        (Grid("int8", 64, zero_point="symmetric"), "bitsandbytes", "use --format gptq or loftq"),
        (Grid("int4", 48, zero_point="integer"), "gptq", r"group size 48: use one of -1, 16, 32"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_those_that_can(grid: Grid, format: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        choose([grid], format)


def test_one_width_a_folder() -> None:
    grids = [Grid(f"int{bits}", 64, zero_point="integer") for bits in (2, 4)]
    with pytest.raises(OptionError, match="one width a folder: use --format loftq"):
        choose(grids, "gptq")
    assert set(LAYOUTS) == {"bitsandbytes", "bitsandbytes-fsdp", "gptq", "loftq", "loftq-trellis"}
