"""GGUF in Q4_1 against the gguf package, transformers' reader, and llama.cpp itself where there is one.

The last runs by the Python that LOFTQ_LLAMA_CPP_PYTHON names (with xllamacpp and cyllama), and is skipped without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from affines import linears_of, quantized, random_affine
from pico_tokenizers import TEMPLATE, TEXT, byte_level, sentence_piece
from picos import pico_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from loftq.core.affine import AffineWeight
from loftq.errors import CheckpointError, OptionError
from loftq.formats import gguf_q4_1
from loftq.formats.checkpoint import TensorSpec

Q4_1 = gguf.GGMLQuantizationType.Q4_1
READER = Path(__file__).parent / "llama_cpp_reader.py"
TOKENS = [5, 8, 200, 17, 3, 90, 41, 6]
KINDS: dict[str, tuple[dict[str, Any], Callable[[], PreTrainedTokenizerFast]]] = {
    "llama": ({}, lambda: byte_level("llama-bpe")),
    "mistral": ({"head_dim": 32}, sentence_piece),
    "qwen2": ({"tie_word_embeddings": True}, lambda: byte_level("qwen2")),
    "qwen3": ({"head_dim": 128}, lambda: byte_level("qwen2")),  # what transformers' reader takes for granted
}
SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
]


def written(path: Path, model: PreTrainedModel, linears: dict[str, AffineWeight], **changes: Any) -> Path:
    """A model with such linears as one file, its other matrices in bfloat16; the tokenizer is in the same folder."""
    model.config.save_pretrained(path.parent)
    config = json.loads((path.parent / "config.json").read_text(encoding="utf-8")) | changes
    held = {f"{name}.weight" for name in linears}
    dense = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name not in held}
    gguf_q4_1.check_linears(config, 4, 32)
    gguf_q4_1.write(
        path,
        config,
        path.parent,
        {name: tuple(weight.codes.shape) for name, weight in linears.items()},
        {name: TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in dense.items()},
        linears.__getitem__,
        dense.__getitem__,
    )
    return path


def made(kind: str, tmp_path: Path, **changes: Any) -> tuple[Path, PreTrainedModel, PreTrainedTokenizerFast]:
    """A pico model as a file in a folder of its own, the model of the decoded weights, and the tokenizer.

    The second block's q_proj and k_proj stay dense. Scales and biases are numbers that float16 has.
    """
    options, build = KINDS[kind]
    tokenizer = build()
    tokenizer.save_pretrained(tmp_path / "source")
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, **changes}
    model = pico_model(kind, "causal-lm", vocab_size=400, **options, **changes)
    dense_names = {name for name in linears_of(model) if name.endswith(("1.self_attn.q_proj", "1.self_attn.k_proj"))}
    linears, exact = quantized(model, 4, 32, halves=True)
    for name in dense_names:
        del linears[name]
        exact.get_submodule(name).weight.data = model.get_submodule(name).weight.data.float()
    file = written(tmp_path / "source" / "model.gguf", exact, linears)
    (tmp_path / "alone").mkdir()
    return file.rename(tmp_path / "alone" / "model.gguf"), exact, tokenizer


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


def test_a_block_by_hand() -> None:
    codes = (torch.arange(64, dtype=torch.uint8) % 16).view(2, 32)
    codes[0, 16:] = 9
    weight = AffineWeight(codes, torch.tensor([[0.5], [2.0]]), torch.tensor([[3.0], [16.0]]), 4)
    found = gguf_q4_1.blocks(weight)
    assert found.shape == (2, 20)
    assert found[0, :4].view(torch.float16).tolist() == [0.5, -1.0]  # scale, shift − 8 · scale
    assert found[0, 4:].tolist() == [i | 9 << 4 for i in range(16)]
    assert found[1, 4:].tolist() == [i | i << 4 for i in range(16)]


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("halves", [True, False])
def test_blocks_read_back(group: int, halves: bool) -> None:
    """Oracle: gguf.dequantize. Exact for scales and biases of 16 bits, else to half a unit of theirs."""
    weight = random_affine(24, 512, 4, group, halves=halves)
    found = gguf.dequantize(gguf_q4_1.blocks(weight).numpy(), Q4_1)
    biases = weight.biases.repeat_interleave(group, dim=1).numpy()
    scales = weight.scales.repeat_interleave(group, dim=1).numpy()
    exact = weight.codes.numpy().astype(np.float32) * scales + biases
    if halves:
        np.testing.assert_array_equal(found, exact)
    else:
        assert (found != exact).any()
        assert (np.abs(found - exact) <= 2**-11 * np.abs(biases) * 1.001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_model_and_the_tokenizer(kind: str, tmp_path: Path) -> None:
    """Oracle: the model of the decoded weights. Each is within what float32 rounds, dense q_proj and ties included."""
    file, exact, tokenizer = made(kind, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = logits_of(exact)
    assert (logits_of(model) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert model.config.tie_word_embeddings == exact.config.tie_word_embeddings

    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (TEXT, "<think>of hello", f"{tokenizer.eos_token}over", " lead"):
        assert read.encode(text) == tokenizer.encode(text)
    assert (read.bos_token, read.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    assert read.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(kind, {}) for kind in KINDS] + [("llama", {"rope_parameters": {"rope_theta": 1e4, **s}}) for s in SCALINGS],
)
def test_llama_cpp_runs_the_model(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the model of the decoded weights; llama.cpp rounds activations to 8 bits."""
    python = os.environ.get("LOFTQ_LLAMA_CPP_PYTHON")
    if not python:
        pytest.skip("no llama.cpp here: LOFTQ_LLAMA_CPP_PYTHON names no Python that has it")
    file, exact, tokenizer = made(kind, tmp_path, **changes)
    out = tmp_path / "out.npz"
    subprocess.run(
        [python, str(READER), str(file), str(out), TEXT, *map(str, TOKENS)],
        check=True,
        timeout=300,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    found = np.load(out)
    expected = logits_of(exact)[-1].log_softmax(0).numpy()
    assert np.abs(found["log_probabilities"] - expected).max() < 0.03 * expected.std() + 0.02
    assert found["ids"].tolist() == tokenizer.encode(TEXT)
    assert found["context"] == 128


def test_each_tensor_has_its_type(tmp_path: Path) -> None:
    file, exact, _ = made("qwen2", tmp_path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["token_embd.weight"] == "BF16"
    assert "output.weight" not in kinds  # tied
    assert kinds["blk.0.attn_q.weight"] == "Q4_1"
    assert kinds["blk.1.attn_q.weight"] == "BF16"
    assert {kinds[f"blk.0.{name}"] for name in ("attn_norm.weight", "attn_q.bias")} == {"F32"}
    assert len(kinds) == len(exact.state_dict()) - 1


def test_tensors_are_read_one_by_one(tmp_path: Path) -> None:
    """When a linear is asked for, those before it are gone."""
    byte_level("qwen2").save_pretrained(tmp_path)
    model = pico_model("qwen2", "causal-lm", vocab_size=400)
    alive: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> AffineWeight:
        assert not any(codes() is not None for codes in alive)
        weight = random_affine(*model.get_submodule(name).weight.shape, 4, 32)
        alive.append(weakref.ref(weight.codes))
        return weight

    shapes = {name: tuple(layer.weight.shape) for name, layer in linears_of(model).items()}
    gguf_q4_1.write(tmp_path / "m.gguf", model.config.to_dict(), tmp_path, shapes, {}, read, lambda _: torch.empty(0))
    assert len(alive) == len(shapes)
    assert (tmp_path / "m.gguf").is_file()


def test_a_tensor_other_than_planned_leaves_no_file(tmp_path: Path) -> None:
    byte_level("qwen2").save_pretrained(tmp_path)
    model = pico_model("qwen2", "causal-lm", vocab_size=400)
    linears, exact = quantized(model, 4, 32)
    name = "model.layers.0.mlp.up_proj"
    before = sorted(path.name for path in tmp_path.iterdir())

    def attempt(read: Callable[[str], AffineWeight]) -> None:
        shapes = {name: tuple(linears[name].codes.shape)}
        gguf_q4_1.write(
            tmp_path / "m.gguf", model.config.to_dict(), tmp_path, shapes, {}, read, lambda _: torch.empty(0)
        )

    with pytest.raises(CheckpointError, match=rf"{name}' is \(64, 128\), planned \(128, 64\)"):
        attempt(lambda _: linears["model.layers.0.mlp.down_proj"])
    with pytest.raises(OptionError, match=rf"{name}: .*4 bits, not 2"):
        attempt(lambda _: random_affine(128, 64, 2, 32))
    with pytest.raises(CheckpointError, match=r"model.norm.weight' is torch.float32 \(64,\), planned torch.float16"):
        gguf_q4_1.write(
            tmp_path / "m.gguf",
            model.config.to_dict(),
            tmp_path,
            {},
            {"model.norm.weight": TensorSpec("model.norm.weight", torch.float16, (64,))},
            linears.__getitem__,
            exact.state_dict().__getitem__,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == before
