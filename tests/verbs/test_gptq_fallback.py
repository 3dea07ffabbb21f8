"""`loftq merge --to gptq` of a plain LoRA: backbone and adapter, rounded anew. Oracle: numpy's reading of the folder.

Covers: loftq/merging/rounded_weights.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, pico_llama, save_model
from mixtures import save_mixture
from oracles import read_gptq
from picos import save_pico
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loftq
from loftq.errors import OptionError

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5]])
TEXT: dict[str, Any] = {"calibration": "default", "calibration_tokens": 4096, "sequence_length": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated start in trellis codes of 2 bits."""
    root = tmp_path_factory.mktemp("tcq")
    source = save_model(pico_llama(), root / "source")
    byte_tokenizer().save_pretrained(source)
    options = {"bits": 2, "quant_type": "tcq", "rank": 4, "refine": 0, "quiet": True, **TEXT}
    return loftq.quantize(str(source), output=root / "out", **options).folder


def merged_weight(folder: Path, name: str) -> torch.Tensor:
    """Backbone plus adapter of a linear, float64."""
    layer = loftq.load_qlora(folder, dtype=torch.float32).get_submodule(f"base_model.model.{name}")
    factors = [getattr(layer, f"lora_{x}")["default"].weight.double() for x in "BA"]
    dense: torch.Tensor = layer.base_layer.dequantize().double() + layer.scaling["default"] * factors[0] @ factors[1]
    return dense.detach()


@pytest.mark.parametrize(
    ("options", "bits", "group"), [({}, 2, 64), ({"bits": 3, "group_size": 32}, 3, 32), (TEXT, 2, 64)]
)
def test_the_merged_weights_are_rounded_and_the_card_says_what_is_lost(
    options: dict[str, Any], bits: int, group: int, folder: Path, tmp_path: Path
) -> None:
    """The recorded loss is that of the files; stock loading gives the values of the files."""
    report = loftq.merge(folder, to="gptq", output=tmp_path / "out", quiet=True, **options)
    assert report.difference is not None
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["quant_method"]) == (bits, group, "gptq")
    manifest = json.loads((tmp_path / "out/loftq.json").read_text())
    stored = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    own = {key: stored[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    found, merged = read_gptq(own, bits, (64, 128)), merged_weight(folder, name)
    loss = float((found - merged).norm() / merged.norm())
    assert 0.02 < loss < 0.8
    assert manifest["source"]["rounding_error"] == pytest.approx(loss, rel=0.5)
    card = (tmp_path / "out/README.md").read_text()
    assert f"{manifest['source']['rounding_error']:.1%} of their norm. That is lost" in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    layer = model.get_submodule(name)
    torch.testing.assert_close(layer(torch.eye(128)).T.double(), found, rtol=1e-3, atol=1e-4)


def test_text_brings_the_answers_nearer(folder: Path, tmp_path: Path) -> None:
    """Oracle: the answers of the backbone with its adapter."""
    pair = loftq.load_qlora(folder, dtype=torch.float32)
    tokens = torch.randint(0, 250, (4, 64), generator=torch.Generator().manual_seed(0))
    differences = []
    with torch.no_grad():
        expected = pair(tokens).logits
        for name, text in (("plain", {}), ("text", TEXT)):
            loftq.merge(folder, to="gptq", output=tmp_path / name, check=False, quiet=True, **text)
            found = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(tokens).logits
            differences.append(float((found - expected).norm()))
    assert differences[1] < 0.9 * differences[0]


def test_what_gptq_cannot_hold(folder: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"bits": 5}, "--bits 5: --to gptq holds 2, 3, 4, 8"),
        ({"allow_rounding": True}, "--allow-rounding: applies to a QA-LoRA"),
        ({"zero_point": "float"}, "zero-point of --to gptq"),
        ({"group_size": 48}, "--group-size 48"),
        ({"calibration_tokens": 4096}, "needs text"),
    ):
        with pytest.raises(OptionError, match=said):
            loftq.merge(folder, to="gptq", output=tmp_path / "out", quiet=True, **options)
        assert not (tmp_path / "out").exists()
    for source, said in (
        (save_pico("gpt2", "causal-lm", tmp_path / "gpt2"), "is a Conv1D: use --to bf16"),
        (save_mixture("qwen3_moe", tmp_path / "mixture"), "no place for fused experts"),
        (save_model(pico_llama(intermediate_size=72), tmp_path / "sides"), r"\(72 x 64\): .* multiples of 32"),
    ):
        made = loftq.quantize(str(source), output=f"{source}-tcq", bits=2, quant_type="tcq", rank=2, quiet=True).folder
        with pytest.raises(OptionError, match=said):
            loftq.merge(made, to="gptq", output=tmp_path / "out", quiet=True)
