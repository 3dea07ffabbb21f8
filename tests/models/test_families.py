"""Every family that the table calls tested, and decoders that go the generic way: quantized, loaded by stock
transformers and peft, compared with the weights they came from."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import SIZES, save_model
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

import loftq
from loftq.formats.artifact import open_artifact
from loftq.models.families import FAMILIES
from loftq.models.loading import guard_cpu

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5]])
CHANGES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {"pad_token_id": 0},
    "phi": {"num_key_value_heads": 4},
    "gemma2": {"head_dim": 16, "pad_token_id": 0},
    "olmo2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def pico_of(model_type: str, folder: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **CHANGES[model_type]})
    return save_model(AutoModelForCausalLM.from_config(config).bfloat16(), folder)


def test_every_tested_family_is_here() -> None:
    assert {name for name, family in FAMILIES.items() if family.tested} <= set(CHANGES)


@pytest.mark.parametrize("model_type", CHANGES)
def test_family(model_type: str, tmp_path: Path) -> None:
    """Oracles: bitsandbytes' dequantization, peft's scaling, the report's errors, full-precision logits."""
    source = pico_of(model_type, tmp_path / model_type)
    folder = loftq.quantize(str(source), output=tmp_path / "out", rank=8, iters=3, alpha=16, quiet=True).folder
    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    weights = {name: module.weight.data for name, module in full.named_modules() if hasattr(module, "weight")}

    base, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    guard_cpu(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True).eval()

    rows = {row["name"]: row for row in open_artifact(folder).manifest["layers"]}
    assert set(rows) == {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    assert all(isinstance(base.get_submodule(name).base_layer, Linear4bit) for name in rows)
    for name, row in rows.items():
        layer = base.get_submodule(name)
        weight = weights[name].double()
        state = layer.base_layer.weight.quant_state
        state.dtype = torch.float32  # the exact product of level and scale, as the report counts it
        rounded = dequantize_4bit(layer.base_layer.weight.data, state).double()
        state.dtype = torch.bfloat16
        factors = layer.lora_B["default"].weight.detach().double() @ layer.lora_A["default"].weight.detach().double()
        error = float((weight - rounded - layer.scaling["default"] * factors).norm() / weight.norm())
        assert error == pytest.approx(row["error"], rel=1e-5)
        assert error < row["plain_error"]

    with torch.no_grad():
        wanted = full(TOKENS).logits.float()
        adapted = model(TOKENS).logits.float()
        with model.disable_adapter():
            alone = model(TOKENS).logits.float()
    assert (adapted - wanted).norm() < (alone - wanted).norm()


def test_generic_way_is_said(tmp_path: Path) -> None:
    report = loftq.quantize(str(pico_of("olmo2", tmp_path / "m")), output=tmp_path / "out", rank=4, dry_run=True)
    assert any("generic" in note for note in report.notes)
