"""MLX's affine layout against numpy's reading of it, and against mlx and mlx-lm themselves where there are any.

`mlx_runner` says by which Python.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from affines import quantized, random_affine
from conftest import byte_tokenizer
from mlx_runner import run_mlx
from oracles import read_stream
from picos import pico_model
from safetensors.torch import load_file

from loftq.core.affine import AffineWeight
from loftq.errors import OptionError
from loftq.formats import mlx
from loftq.formats.checkpoint import SINGLE, TensorSpec, lay_out
from loftq.formats.shard_writer import ShardWriter

SHAPES = [(8, 64, 32), (5, 192, 64), (24, 256, 128)]
NARROW = "model.layers.1.mlp.down_proj"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
TOKENS = [5, 8, 200, 17, 3, 90, 41, 6]


def written(folder: Path, linears: dict[str, AffineWeight], dense: dict[str, torch.Tensor]) -> Path:
    """A safetensors file of such linears and dense tensors, as an export writes it."""
    groups = [
        mlx.specs(name, weight.codes.shape, weight.bits, weight.group_size) for name, weight in linears.items()
    ] + [[TensorSpec(name, tensor.dtype, tuple(tensor.shape))] for name, tensor in dense.items()]
    with ShardWriter(folder, lay_out(groups, 10**9, metadata=mlx.METADATA)) as writer:
        for module, weight in linears.items():
            for name, tensor in mlx.tensors(module, weight).items():
                writer.write(name, tensor)
        for name, tensor in dense.items():
            writer.write(name, tensor)
    return folder / SINGLE


def read(tensors: dict[str, torch.Tensor], module: str, bits: int, columns: int) -> np.ndarray:
    """A weight of MLX's layout from its tensors, by numpy: float64 (out, in)."""
    words = tensors[f"{module}.weight"].numpy()
    assert words.dtype == np.uint32
    codes = np.stack([read_stream(row.view(np.uint8), bits, columns) for row in words])
    scales, biases = (tensors[f"{module}.{part}"].numpy().astype(np.float64) for part in ("scales", "biases"))
    group = columns // scales.shape[1]
    return np.repeat(scales, group, axis=1) * codes + np.repeat(biases, group, axis=1)


def assert_same_weight(found: np.ndarray, weight: AffineWeight) -> None:
    """Equal but for one rounding of the bias to 24 bits, and those of the reader."""
    reach = weight.biases.abs().max().item() + weight.scales.max().item() * 2**weight.bits
    np.testing.assert_allclose(found, weight.decode(torch.float64).numpy(), rtol=0, atol=reach * 2**-22)


@pytest.mark.parametrize("bits", mlx.BITS)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_the_file_reads_back(rows: int, columns: int, group: int, bits: int, tmp_path: Path) -> None:
    """Oracle: numpy's reading of the words in the file."""
    weight = random_affine(rows, columns, bits, group)
    tensors = load_file(written(tmp_path, {"a.m": weight}, {}))
    assert_same_weight(read(tensors, "a.m", bits, columns), weight)


def test_a_word_by_hand() -> None:
    """A row of 3-bit codes 0, 1, …, 7, 0, …: 32 of them in three words, the eleventh across two."""
    codes = (torch.arange(64, dtype=torch.uint8) % 8).view(2, 32)
    weight = AffineWeight(codes, torch.tensor([[0.5], [2.0]]), torch.tensor([[1.0], [-3.0]]), 3)
    found = mlx.tensors("m", weight)
    stream = sum((i % 8) << (3 * i) for i in range(32))
    assert found["m.weight"].tolist() == [[(stream >> (32 * i)) & 0xFFFFFFFF for i in range(3)]] * 2
    assert found["m.scales"].tolist() == [[0.5], [2.0]]
    assert found["m.biases"].tolist() == [[-1.0], [-11.0]]  # shift − 4 · scale


@pytest.mark.parametrize("bits", mlx.BITS)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_the_tensors_are_as_planned(rows: int, columns: int, group: int, bits: int) -> None:
    found = mlx.tensors("m", random_affine(rows, columns, bits, group))
    planned = mlx.specs("m", (rows, columns), bits, group)
    assert {spec.name: (spec.dtype, spec.shape) for spec in planned} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()
    }


def test_the_config_says_width_and_group_and_forgets_what_was() -> None:
    source = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    entry = {"group_size": 64, "bits": 4, "mode": "affine"}
    found = mlx.config(source, 4, 64)
    assert found == {"model_type": "llama", "quantization": entry, "quantization_config": entry}
    assert source["quantization_config"] == {"quant_method": "gptq"}
    mixed = mlx.config(source, 4, 64, {"model.layers.0.mlp.up_proj": 2})["quantization"]
    assert mixed == {**entry, "model.layers.0.mlp.up_proj": {**entry, "bits": 2}}


def test_the_rotary_embedding_is_said_as_mlx_lm_reads_it() -> None:
    found = mlx.config({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 4, 64)
    assert found["rope_theta"] == 5e5
    assert "rope_scaling" not in found
    found = mlx.config({"rope_parameters": LLAMA3}, 4, 64)
    assert found["rope_scaling"] == {**LLAMA3, "type": "llama3"}
    old = {"rope_theta": 1e6, "rope_scaling": None}
    assert mlx.config(old, 4, 64).items() >= old.items()


@pytest.mark.parametrize(
    ("bits", "group", "said"),
    [(5, 64, "2, 3, 4, 8 bits, not 5"), (4, 16, "32, 64, 128 inputs, not 16: .*--group-size 64")],
)
def test_what_has_no_place_is_refused(bits: int, group: int, said: str) -> None:
    mlx.check_linears(4, 64)
    with pytest.raises(OptionError, match=said):
        mlx.check_linears(bits, group)


def test_groups_must_divide_the_inputs() -> None:
    with pytest.raises(OptionError, match=r"a\.m: groups of 64 do not divide its 96 inputs"):
        mlx.specs("a.m", (8, 96), 4, 64)


CASES = [(2, 32), (3, 64), (4, 128), (8, 32), (4, 64)]


@pytest.mark.parametrize(("bits", "group"), CASES)
def test_mlx_reads_the_same_weights(bits: int, group: int, tmp_path: Path) -> None:
    """Oracle: mx.load and mx.dequantize."""
    linears = {f"m{rows}": random_affine(rows, 256, bits, group) for rows in (8, 40)}
    file = written(tmp_path, linears, {})
    found = run_mlx("dequantize", file, tmp_path / "out.npz", bits, group)
    assert set(found) == set(linears)
    for name, weight in linears.items():
        assert found[name].dtype == np.float32
        assert_same_weight(found[name], weight)


@pytest.mark.parametrize(
    ("kind", "changes", "dtype", "close"),
    [
        ("llama", {}, torch.float32, 1e-5),
        ("llama", {}, torch.bfloat16, 1e-2),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}, torch.float32, 1e-5),
        ("llama", {"rope_parameters": LLAMA3}, torch.float32, 1e-5),
        ("mistral", {"head_dim": 32}, torch.float32, 1e-5),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}, torch.float32, 1e-5),
        ("qwen3", {"tie_word_embeddings": True}, torch.float32, 1e-5),
    ],
)
def test_mlx_lm_runs_the_model(
    kind: str, changes: dict[str, Any], dtype: torch.dtype, close: float, tmp_path: Path
) -> None:
    """Oracle: transformers, in float32, with the decoded weights in place. One linear is of another width."""
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, **changes}
    linears, model = quantized(pico_model(kind, "causal-lm", **changes), 4, 32)
    linears[NARROW] = random_affine(64, 128, 2, 32)
    model.get_submodule(NARROW).weight.data = linears[NARROW].decode()
    held = {f"{name}.weight" for name in linears} | ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    dense = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if name not in held}
    written(tmp_path, linears, dense)
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = mlx.config(json.loads(file.read_text(encoding="utf-8")), 4, 32, {NARROW: 2})
    file.write_text(json.dumps(config), encoding="utf-8")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)

    found = run_mlx("logits", tmp_path, tmp_path / "out.npz", *TOKENS)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits.numpy()
    assert found["kinds"].tolist() == ["QuantizedLinear"] * 2
    assert np.abs(found["logits"] - expected).max() < close * np.abs(expected).max()
    assert found["dtype"] == "mlx.core.float32"
    assert found["tokens"].tolist() == tokenizer.encode("Hello, world")
