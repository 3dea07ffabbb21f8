"""Oracles: what transformers loads from the same files with `dequantize=True`, and the formulas written as loops."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, byte_tokenizer, pico_llama, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import loftq
from loftq.errors import CheckpointError
from loftq.formats.checkpoint import SINGLE, read_checkpoint
from loftq.formats.prequantized import DenseView, dense_view
from loftq.models.tasks import TASKS
from loftq.training.model import find_model
from loftq.training.open_model import load_dense

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


def to_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, in) in float8, and the scale of each block."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    """Replace the tensors of a model's folder, and name their quantization in its configuration."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A pico llama whose linears are float8 in blocks of 32 x 32."""
    folder = save_model(pico_llama(), tmp_path / "fp8")
    byte_tokenizer().save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / SINGLE).items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensor, (32, 32))
            tensors[name.replace("weight", "activation_scale")] = torch.ones(())
        else:
            tensors[name] = tensor
    return rewrite(folder, tensors, FP8)


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    """A pico gpt-oss whose experts are MXFP4, with random codes and scales."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    folder = save_model(GptOssForCausalLM(config).bfloat16(), tmp_path / "mxfp4")
    tensors = load_file(folder / SINGLE)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(110, 130, (experts, outputs, inputs // 32), dtype=torch.uint8)
    return rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def view(folder: Path, dtype: torch.dtype = torch.bfloat16) -> DenseView:
    """The dense view of a folder."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    dense = dense_view(read_checkpoint(folder), quantization, dtype)
    assert dense is not None
    return dense


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_values_are_those_that_transformers_loads(kind: str, request: pytest.FixtureRequest) -> None:
    """To the last bit; and the full-precision side of a comparison is loaded in the same way."""
    folder = request.getfixturevalue(kind)
    config = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    dense = view(folder)
    assert set(dense.tensors) == set(config)
    for name, spec in dense.tensors.items():
        assert dense.read(name).dtype == spec.dtype
        assert dense.read(name).shape == spec.shape
        assert torch.equal(dense.read(name), config[name]), name
        if len(spec.shape) == 3:  # experts can be read one by one
            assert torch.equal(dense.read_member(name, 1), config[name][1])
    source: Any = find_model(str(folder))
    opened = load_dense(source, TASKS["causal-lm"], torch.bfloat16, torch.device("cpu"))
    assert all(torch.equal(value, config[name]) for name, value in opened.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "block"), [((48, 40), (32, 32)), ((576, 64), (128, 128)), ((3, 48, 40), (32, 32)), ((32, 64), (1, 32))]
)
def test_blocks_at_the_edges_are_shorter(shape: tuple[int, ...], block: tuple[int, int], tmp_path: Path) -> None:
    """As in DeepSeek-V3, where 576 rows have five scales; stacks of experts have a grid each."""
    stack = torch.randn(shape).reshape(-1, *shape[-2:])
    parts = [to_fp8(weight, block) for weight in stack]
    codes, scales = (torch.stack(some).view(*shape[:-2], *some[0].shape) for some in zip(*parts, strict=True))
    save_file({"x": codes, "x_scale_inv": scales}, tmp_path / SINGLE)
    dense = dense_view(read_checkpoint(tmp_path), FP8 | {"weight_block_size": list(block)}, torch.float32)
    assert dense is not None
    expected = codes.float()
    for place in torch.cartesian_prod(*(torch.arange(side) for side in shape)):
        *experts, row, column = place.tolist()
        expected[tuple(place)] *= scales[(*experts, row // block[0], column // block[1])]
    assert torch.equal(dense.read("x"), expected)
    if len(shape) == 3:
        assert torch.equal(dense.read_member("x", 2), expected[2])


@pytest.mark.parametrize(
    "scales", [torch.tensor(0.25), torch.tensor([[0.25]]), torch.tensor([[125]], dtype=torch.uint8)]
)
def test_one_scale_for_all_and_exponents(scales: torch.Tensor, tmp_path: Path) -> None:
    """A number, a grid of one, and an exponent of two plus 127."""
    codes = torch.randn(48, 40).to(torch.float8_e4m3fn)
    save_file({"x": codes, "x_scale_inv": scales}, tmp_path / SINGLE)
    dense = dense_view(read_checkpoint(tmp_path), FP8 | {"weight_block_size": None}, torch.float32)
    assert dense is not None
    assert torch.equal(dense.read("x"), codes.float() / 4)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_it_is_quantized_as_its_dense_weights_are(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The files of weights are the same bytes; the plan says that the source was quantized, and `verify` accepts it."""
    folder = request.getfixturevalue(kind)
    dense = shutil.copytree(folder, tmp_path / "dense")
    rewrite(dense, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict(), {})
    for source, output in ((folder, "a"), (dense, "b")):
        loftq.quantize(str(source), output=tmp_path / output, rank=4, quiet=True)
    for file in (SINGLE, "loftq_init/adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert any("dequantized" in note for note in json.loads((tmp_path / "a/loftq.json").read_text())["notes"])
    assert not loftq.verify(tmp_path / "a", source=folder, quiet=True).problems


@pytest.mark.parametrize(
    ("kind", "tensor", "shape"),
    [
        ("fp8", "model.layers.0.self_attn.q_proj.weight_scale_inv", (3, 2)),
        ("mxfp4", "model.layers.0.mlp.experts.down_proj_scales", (4, 64, 3)),
    ],
)
def test_scales_that_do_not_fit_are_named(
    kind: str, tensor: str, shape: tuple[int, ...], request: pytest.FixtureRequest, run: Callable[..., Result]
) -> None:
    """Before anything is read."""
    folder = request.getfixturevalue(kind)
    tensors = load_file(folder / SINGLE)
    tensors[tensor] = tensors[tensor].new_ones(shape)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=tensor):
        view(folder)
    result = run("quantize", folder, "--dry-run")
    assert result.exit_code == 1
    assert tensor in result.stderr


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", None, 5])
def test_other_kinds_are_refused(method: object, fp8: Path, run: Callable[..., Result]) -> None:
    """One line names the kind, those that are read, and the way."""
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (fp8 / "config.json").write_text(json.dumps(config))
    result = run("quantize", fp8, "--dry-run")
    assert result.exit_code == 1
    assert f"already quantized ({method})" in result.stderr
    assert "fp8 or mxfp4" in result.stderr
