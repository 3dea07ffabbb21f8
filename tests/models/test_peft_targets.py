"""Which modules peft adapts. Oracle: peft itself, by the layers that it puts into a model."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, save_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import loftq
from loftq.errors import ArtifactError, OptionError
from loftq.models.linears import find_linears
from loftq.models.peft_targets import adapt, load_adapter, redirected, refused

ROUTED = {"n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 16}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "glm4_moe": ROUTED,
    "deepseek_v2": {**ROUTED, **LATENT},
    "qwen2_moe": ROUTED,
    "mamba": {"state_size": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
}


def tiny(model_type: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, "pad_token_id": 0, **MODELS[model_type]})
    return AutoModelForCausalLM.from_config(config).bfloat16()


@pytest.mark.parametrize("model_type", MODELS)
def test_what_peft_says_of_each_module_is_what_it_does(model_type: str) -> None:
    model = tiny(model_type)
    names = list(find_linears(model).candidates)
    left_out = {*refused(model, names), *redirected(model, names)}
    for last in sorted({name.rpartition(".")[2] for name in names}):
        wanted = {name for name in names if name.rpartition(".")[2] == last}
        try:
            adapted = get_peft_model(tiny(model_type), LoraConfig(r=2, target_modules=[last])).base_model.model
        except (ValueError, NotImplementedError):
            assert wanted <= left_out
            continue
        layers = {name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
        assert (wanted <= layers) == wanted.isdisjoint(left_out), last


def test_redirected_modules_are_adapted_by_their_names() -> None:
    names = redirected(model := tiny("glm4_moe"), find_linears(tiny("glm4_moe")).candidates)
    assert any("shared_experts" in name for name in names)
    adapted = adapt(model, LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
    layers = {name for name, module in adapted.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    assert layers == set(names)
    with warnings.catch_warnings(action="ignore"):  # peft warns about a rank that it had set itself
        plain = get_peft_model(tiny("glm4_moe"), LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
    kinds = {name for name, module in plain.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    assert layers.isdisjoint(kinds)  # outside of `adapt`, peft does as it did


def test_a_refusal_of_peft_is_an_error_of_ours() -> None:
    with pytest.raises(OptionError, match=r"peft refuses this adapter: .*out_proj"):
        adapt(tiny("mamba"), LoraConfig(r=2, target_modules=["out_proj"]))


@pytest.mark.parametrize("model_type", ["glm4_moe", "mamba"])
def test_stock_peft_loads_every_tensor_of_the_adapter(model_type: str, tmp_path: Path) -> None:
    source = save_model(tiny(model_type), tmp_path / "source")
    report = loftq.quantize(str(source), output=tmp_path / "out", rank=4, iters=1, quiet=True)
    assert any("stay in bfloat16, because peft" in note for note in report.notes)
    factors = load_file(report.folder / "loftq_init" / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(report.folder, dtype=torch.bfloat16)
    stock = PeftModel.from_pretrained(base, report.folder, subfolder="loftq_init")
    for model in (stock, loftq.load_qlora(report.folder)):
        layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
        assert set(layers) == {row["name"] for row in report.layers}
        for name, layer in layers.items():
            for letter, module in (("A", layer.lora_A), ("B", layer.lora_B)):
                assert torch.equal(
                    module["default"].weight.float(), factors[f"base_model.model.{name}.lora_{letter}.weight"]
                )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("more", "has a tensor without a place in the model: .*mlp.gate.lora_A"),
        ("less", "holds no complete pair of factors of 'model.layers.0.self_attn.q_proj'"),
    ],
)
def test_every_tensor_has_its_place(change: str, problem: str, pico: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    if change == "more":
        tensors["base_model.model.model.layers.0.mlp.gate.lora_A.bias"] = torch.zeros(2)
    else:
        del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, tmp_path / "b" / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(pico)
    load_adapter(AutoModelForCausalLM.from_pretrained(pico), tmp_path / "a")
    with warnings.catch_warnings(action="ignore"), pytest.raises(ArtifactError, match=problem):  # peft only warns
        load_adapter(base, tmp_path / "b")
