"""Weights that other programs quantized. Oracles: bitsandbytes' own dequantization, and the compressor that
compressed-tensors registers for a format; for AWQ a packer written from the published order; transformers for FP8.

Covers: loftq/formats/given_compressed.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from loftq.errors import CheckpointError
from loftq.formats.checkpoint import SINGLE, read_checkpoint
from loftq.formats.given_weights import given_view
from loftq.formats.prequantized import DenseView

SHAPE = (48, 128)


def view_of(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> DenseView:
    """A checkpoint of these tensors, read as a dense one."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return given_view(read_checkpoint(folder), quantization, torch.bfloat16, str(folder))


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 128])
def test_bitsandbytes(kind: str, double: bool, block: int, weight: torch.Tensor, tmp_path: Path) -> None:
    codes, state = bnb.quantize_4bit(weight.bfloat16(), blocksize=block, quant_type=kind, compress_statistics=double)
    parts = {f"a.b.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    dense = {"a.b.bias": torch.ones(48), "c.weight": torch.ones(2, 2)}
    view = view_of(tmp_path / "in", {"a.b.weight": codes, **parts, **dense}, {"quant_method": "bitsandbytes"})
    assert view.tensors.keys() == {"a.b.weight", "a.b.bias", "c.weight"}
    assert view.tensors["a.b.weight"].shape == SHAPE
    assert list(view.decoded) == ["a.b.weight"]
    assert torch.equal(view.read("a.b.weight"), bnb.dequantize_4bit(codes, state))


def test_bitsandbytes_in_a_storage_of_16_bits(weight: torch.Tensor, tmp_path: Path) -> None:
    codes, state = bnb.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4", quant_storage=torch.bfloat16)
    assert codes.dtype == torch.bfloat16
    parts = {f"a.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    view = view_of(tmp_path / "in", {"a.weight": codes, **parts}, {"quant_method": "bitsandbytes"})
    assert torch.equal(view.read("a.weight"), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize(("format", "less"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_with_act_order(format: str, less: int, tmp_path: Path) -> None:
    """The published formula, one weight at a time."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (128, 48), generator=generator)
    zeros = torch.randint(1, 16, (4, 48), generator=generator)
    scales = torch.rand(4, 48, generator=generator).half()
    groups = torch.randint(0, 4, (128,), generator=generator, dtype=torch.int32)
    words = torch.zeros(16, 48, dtype=torch.int32)
    for i in range(128):
        words[i // 8] |= codes[i].int() << (4 * (i % 8))
    points = torch.zeros(4, 6, dtype=torch.int32)
    for o in range(48):
        points[:, o // 8] |= (zeros[:, o] - less).int() << (4 * (o % 8))
    parts = {"a.qweight": words, "a.qzeros": points, "a.scales": scales, "a.g_idx": groups}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}
    view = view_of(tmp_path / "in", parts, {**config, "checkpoint_format": format})
    expected = torch.empty(SHAPE)
    for o in range(48):
        for i in range(128):
            expected[o, i] = (codes[i, o] - zeros[groups[i], o]) * scales[groups[i], o].float()
    torch.testing.assert_close(view.read("a.weight"), expected, rtol=1e-6, atol=1e-6)


def test_bitsandbytes_in_8_bits(weight: torch.Tensor, tmp_path: Path) -> None:
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    tensors = {"a.weight": codes, "a.SCB": scales, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    view = view_of(tmp_path / "in", tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert view.tensors.keys() == {"a.weight"}
    expected = bnb.int8_vectorwise_dequant(codes, scales)
    torch.testing.assert_close(view.read("a.weight").float(), expected.float(), rtol=2**-8, atol=0)


def awq_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes (rows, out) as AutoAWQ packs them: of eight, the one at place i of a word is number ORDER[i]."""
    words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int32)
    for column in range(words.shape[1]):
        for place, number in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, column] |= codes[:, column * 8 + number].int() << (4 * place)
    return words


def test_awq(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, zeros = (torch.randint(0, 16, (rows, 48), generator=generator) for rows in (128, 4))
    scales = torch.rand(4, 48, generator=generator).half()
    parts = {"a.qweight": awq_words(codes), "a.qzeros": awq_words(zeros), "a.scales": scales}
    view = view_of(tmp_path / "in", parts, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})
    expected = torch.empty(SHAPE)
    for o in range(48):
        for i in range(128):
            expected[o, i] = (codes[i, o] - zeros[i // 32, o]) * scales[i // 32, o].float()
    assert view.tensors["a.weight"].shape == SHAPE
    assert torch.equal(view.read("a.weight"), expected)
    with pytest.raises(CheckpointError, match="AWQ of 4 bits, version gemv, cannot be read: expected 4 bits, gemm"):
        view_of(tmp_path / "gemv", parts, {"quant_method": "awq", "bits": 4, "version": "GEMV"})
    del parts["a.qzeros"]
    with pytest.raises(CheckpointError, match=r"a\.qzeros of the AWQ checkpoint is missing"):
        view_of(tmp_path / "less", parts, {"quant_method": "awq", "bits": 4})


FORMATS = [
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}),
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
    ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}),
]


@pytest.mark.parametrize(("format", "arguments"), FORMATS)
def test_compressed_tensors(format: str, arguments: dict[str, Any], weight: torch.Tensor, tmp_path: Path) -> None:
    """The package compresses the weight, and decompresses it again."""
    weights = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=format)
    groups = {"group": 4, "channel": 1}.get(arguments["strategy"])
    shape = (1,) if groups is None else (48, groups)
    spread = weight.view(48, groups, -1) if groups else weight.view(1, 1, -1)
    most = 448.0 if arguments.get("type") == "float" else 2.0 ** (arguments["num_bits"] - 1) - 1
    scale = (spread.abs().amax(dim=-1) / most).view(shape).bfloat16()
    state = {"weight": weight.bfloat16(), "weight_scale": scale}
    if not arguments["symmetric"]:
        state["weight_zero_point"] = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1)).to(
            torch.int8
        )
    compressor = BaseCompressor.get_value_from_registry(format)
    compressed = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(compressed), scheme)["weight"]
    group = {"weights": {"num_bits": arguments["num_bits"]}, "format": format}
    config = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    parts = {f"a.{name}": tensor for name, tensor in compressed.items()}
    view = view_of(tmp_path / "in", {**parts, "b.weight": torch.ones(2, 2)}, config)
    assert view.tensors.keys() == {"a.weight", "b.weight"}
    torch.testing.assert_close(view.read("a.weight").float(), expected.float(), rtol=2**-7, atol=0)


def test_kinds_that_cannot_be_read(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match=r"is quantized with hqq, which cannot be read: expected fp8, mxfp4"):
        view_of(tmp_path / "hqq", tensors, {"quant_method": "hqq"})
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": {"format": "nvfp4-pack-quantized"}}}
    with pytest.raises(CheckpointError, match="has the format nvfp4-pack-quantized of compressed-tensors"):
        view_of(tmp_path / "nvfp4", tensors, config)
    state = torch.tensor(list(b'{"blocksize": 64}'), dtype=torch.uint8)
    parts = {"a.weight": torch.zeros(2, 1, dtype=torch.uint8), "a.weight.quant_state.bitsandbytes__nf4": state}
    with pytest.raises(CheckpointError, match=r"quant_state.bitsandbytes__nf4' is damaged"):
        view_of(tmp_path / "state", parts, {"quant_method": "bitsandbytes"})
