"""A pico model of every family: two layers, made from the config of its type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import SIZES, save_model
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loftq.models.families import family_of
from loftq.models.tasks import TASKS, auto_class

TOKENS = torch.randint(6, 290, (16, 12), generator=torch.Generator().manual_seed(0))
TOKENS[:, -1] = 5  # the end, which some classifiers look for
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "eos_token_id": 5,
    "scale_embedding": False,
}
_T5 = {
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "eos_token_id": 5,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "type_vocab_size": 0,
    "pad_token_id": 0,
    "max_relative_positions": 32,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
# What differs from conftest's SIZES; a name with a slash is a variant of the type before it.
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {"pad_token_id": 0},
    "gemma2": {"head_dim": 16, "pad_token_id": 0},
    "gemma3_text": {"head_dim": 16, "pad_token_id": 0},
    "gemma3": {
        "text_config": {**SIZES, "head_dim": 16, "pad_token_id": 0},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 300,
        "boi_token_index": 301,
        "eoi_token_index": 302,
    },
    "olmo2": {},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"pad_token_id": 0},
    "falcon": {"ffn_hidden_size": 128, "bias": False, "new_decoder_architecture": False, "multi_query": True},
    "falcon/new": {"ffn_hidden_size": 128, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon/bias": {"ffn_hidden_size": 128, "bias": True, "multi_query": False, "alibi": True, "parallel_attn": False},
    "gpt2": {"n_inner": 128, "pad_token_id": 0},
    "gpt_neox": {},
    "bloom": {"n_head": 4},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_ROUTED, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_ROUTED, "head_dim": 16},
    "olmoe": _ROUTED,
    "bart": _BART,
    "mbart": _BART,
    "pegasus": _BART,
    "marian": {**_BART, "decoder_vocab_size": 320},
    "t5": _T5,
    "t5/gated": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "bert": {},
    "roberta": {"pad_token_id": 1, "max_position_embeddings": 130},
    "xlm-roberta": {"pad_token_id": 1, "max_position_embeddings": 130},
    "electra": {"embedding_size": 64},
    "deberta": _DEBERTA,
    "deberta-v2": {**_DEBERTA, "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "deberta-v2/unshared": {**_DEBERTA, "share_att_key": False},
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    "albert": {"embedding_size": 64},
    "vit": _VISION,
    # no row: the generic way
    "granite": {},
    "stablelm": {},
    "codegen": {"n_embd": 64, "n_inner": 128, "n_head": 4, "n_layer": 2, "rotary_dim": 8},
    "camembert": {"pad_token_id": 1, "max_position_embeddings": 130},
}


# Families whose modules and names are those of another one: the whole suite runs them, the quick one does not.
TWINS = {
    "mistral": "llama",
    "qwen2": "llama",
    "smollm3": "llama",
    "olmo2": "qwen3",
    "stablelm": "llama",
    "falcon/bias": "falcon",
    "qwen3_moe": "qwen2_moe",
    "mbart": "bart",
    "pegasus": "bart",
    "mt5": "t5/gated",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "deberta-v2/unshared": "deberta-v2",
    "gemma2": "gemma3_text",
    "gpt_neox": "bloom",
    "roberta": "bert",
    "electra": "bert",
    "marian": "bart",
    "olmoe": "qwen2_moe",
    "granite": "llama",
}


def pico_config(name: str, **changes: Any) -> PretrainedConfig:
    """The config of a family's pico model."""
    kind = name.partition("/")[0]
    sizes: dict[str, Any] = {} if "text_config" in CHANGES[name] or kind == "vit" else dict(SIZES)
    return AutoConfig.for_model(kind, **{"pad_token_id": 0, **sizes, **CHANGES[name], **changes})


def pico_model(name: str, task: str, **changes: Any) -> PreTrainedModel:
    """A family's pico model in bfloat16, with reproducible weights that are large enough to matter."""
    torch.manual_seed(0)
    if task.endswith("-classification"):
        changes = {"num_labels": 8, **changes}
    model: PreTrainedModel = auto_class(TASKS[task]).from_config(pico_config(name, **changes))
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            module.weight.data *= 3  # as initialized, they hardly show in the output
    return model.to(dtype_of(name)).eval()


def dtype_of(name: str) -> torch.dtype:
    """In which transformers can run a family."""
    return torch.float32 if family_of(name).float32 else torch.bfloat16


def save_pico(name: str, task: str, folder: Path, **changes: Any) -> Path:
    """Save it as a checkpoint."""
    return save_model(pico_model(name, task, **changes), folder)


def inputs_for(model: Any) -> dict[str, torch.Tensor]:
    """What the forward of such a model takes."""
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        pixels = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels.bfloat16()}
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    if model.config.model_type == "gemma3":
        inputs["token_type_ids"] = torch.zeros_like(TOKENS)  # text alone
    if model.config.is_encoder_decoder and "Classification" not in type(model).__name__:
        inputs["decoder_input_ids"] = TOKENS.flip(1)
    return inputs


def output_of(model: Any, base: Any = None) -> torch.Tensor:
    """Logits, or the last hidden state, in float32."""
    found = model(**inputs_for(base if base is not None else model))
    for key in ("logits", "start_logits", "last_hidden_state"):
        if key in found:
            return found[key].float()
    raise AssertionError(f"no output in {list(found)}")
