"""A pico mixture of experts of many types: two layers, four experts, made from the config of its type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import SIZES, save_model
from transformers import AutoConfig, AutoModelForCausalLM

_ROUTED = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_intermediate_size": 96,
    "head_dim": 16,
}
_SHARED = {"n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
    "mixtral": {"intermediate_size": 96},
    "olmoe": {"intermediate_size": 96},
    "gpt_oss": {"intermediate_size": 96, "sliding_window": 32},  # transposed, interleaved, with biases
    "nemotron_h": {"layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": 64, **_SHARED},
    "deepseek_v3": {**_SHARED, **_LATENT, "num_key_value_heads": 4},
    "deepseek_v2": {**_SHARED, **_LATENT, "num_key_value_heads": 4},
    "glm4_moe": _SHARED,
    "qwen3_next": {
        "shared_expert_intermediate_size": 64,
        "layer_types": ["full_attention", "full_attention"],
        "decoder_sparse_step": 1,
    },
    "dots1": _SHARED,
    "granitemoe": {"intermediate_size": 96},
    "phimoe": {"intermediate_size": 96},
    "minimax_m2": {"intermediate_size": 96},
    "ernie4_5_moe": {"moe_layer_start_index": 0, "moe_layer_interval": 1, "moe_layer_end_index": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"], "num_dense_layers": 0},
    "hunyuan_v1_moe": {"moe_topk": 2, "intermediate_size": 96},
    "solar_open": _SHARED,
}


def pico_mixture(name: str, **changes: Any) -> Any:
    """The pico model of a mixture in bfloat16, with reproducible weights that are large enough to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, "pad_token_id": 0, **_ROUTED, **MIXTURES[name], **changes})
    model = AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1 and not key.endswith(("embed_tokens.weight", "lm_head.weight")):
            parameter.data = torch.randn(parameter.shape) * 0.1
    return model.bfloat16().eval()


def save_mixture(name: str, folder: Path, **changes: Any) -> Path:
    """Save it as a checkpoint."""
    return save_model(pico_mixture(name, **changes), folder)
