"""A small config of any model type: the type's own default config, with sizes that a test can afford.

Sizes are recognized by the names that configs give them. `CHANGES` has what some types need beside that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

LAYERS, WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY, EXPERTS = 2, 64, 128, 4, 2, 320, 4
END = 5  # the token that some classifiers look for

# What is not listed keeps its default.
_SIZES: tuple[tuple[int, str], ...] = (
    (
        LAYERS,
        """
        num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers depth encoder_depth layers num_blocks vision_layers resampler_depth
        decoder_num_hidden_layers memory_attention_num_layers
        """,
    ),
    (
        WIDTH,
        """
        hidden_size d_model n_embd dim embed_dim word_embed_proj_dim d_embed embedding_size embedding_dim
        out_hidden_size encoder_hidden_size output_hidden_size vision_hidden_size dim_model text_hidden_size
        projection_dim projection_size emb_dim lru_width attention_hidden_size classifier_proj_size
        decoder_hidden_size pooler_hidden_size pooler_output_size hidden_size_global embed_hidden_size
        vision_output_dim text_embed_dim encoder_hidden_dim head_hidden_size moe_latent_size codebook_dim
        fusion_hidden_size patch_embed_hidden_size
        """,
    ),
    (
        INNER,
        """
        intermediate_size ffn_dim d_ff n_inner hidden_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
        d_inner shared_expert_intermediate_size moe_intermediate_size block_ff_dim dff dim_ff
        moe_shared_expert_intermediate_size intermediate_size_mlp shared_intermediate_size mlp_dim ffn_size
        dense_intermediate_size linear_units moe_shared_intermediate_size
        """,
    ),
    (
        HEADS,
        """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads decoder_num_attention_heads
        vision_heads swa_num_attention_heads linear_num_heads
        """,
    ),
    (
        KV_HEADS,
        """
        num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads linear_num_value_heads
        vision_num_key_value_heads
        """,
    ),
    (VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size"),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts expert_num"),
    (
        16,
        """
        head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim d_kv swa_head_dim kv_lora_rank linear_key_head_dim
        linear_value_head_dim linear_head_dim attention_head_dim index_head_dim global_head_dim mamba_d_state
        state_size mamba_head_dim mamba_d_head ssm_state_size hidden_size_per_layer_input dim_head kda_head_dim
        """,
    ),
    (40, "max_source_positions"),
    (32, "q_lora_rank qk_head_dim sliding_window index_topk local_attention"),
    (128, "max_target_positions max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len"),
    (
        2,
        """
        num_experts_per_tok num_experts_per_token moe_top_k moe_topk moe_k top_k_experts num_hash_layers
        num_conv_pos_embeddings num_conv_pos_embedding_groups index_n_heads
        """,
    ),
    (1, "n_shared_experts num_shared_experts n_group topk_group moe_num_shared_experts"),
    (
        0,
        """
        first_k_dense_replace num_dense_layers moe_layer_start_index layerdrop encoder_layerdrop
        decoder_layerdrop
        """,
    ),
)
_DERIVED = ("transformers_version", "dtype", "out_features", "out_indices", "stage_names", "per_layer_config")
_SIZE_OF = {name: size for size, names in _SIZES for name in names.split()}

CHANGES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "kv_channels": 16,
        "num_query_groups": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 32},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 16},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "esm": {"vocab_size": 320, "pad_token_id": 1, "mask_token_id": 2},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4},
    "convnext": {"layer_scale_init_value": 1.0, "hidden_sizes": [64, 64, 128, 128], "depths": [1, 1, 1, 1]},
    "pvt": {"hidden_sizes": [64, 64, 128, 128], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4]},
    "bailing_hybrid": {"n_group": 1},
    "falcon": {"ffn_hidden_size": 128},
    "mpt": {"expansion_ratio": 2},
    "mobilebert": {"embedding_size": 32},  # else its head has a weight of no columns
    "xlnet": {"d_head": 16},
    "swin": {"num_heads": [4], "depths": [2]},
    "whisper": {"max_source_positions": 20, "max_target_positions": 64, "suppress_tokens": None},
}
# The default config of these types lacks a size, and no model can be built from it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "nemotron": {"num_key_value_heads": 48},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16},
    "deepseek_v2": {"moe_intermediate_size": 1408},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}


def default_config(kind: str) -> PretrainedConfig:
    """The config of a model type, with the sizes that it has by default."""
    return CONFIG_MAPPING[kind](**DEFAULTS.get(kind, {}))


def small_config(kind: str, **changes: Any) -> PretrainedConfig:
    """The small config of a model type."""
    default = CONFIG_MAPPING[kind]()
    return type(default)(**{**_shrunk(default), **CHANGES.get(kind, {}), **changes})


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The arguments of a small config of the same class."""
    values = {key: value for key, value in config.to_dict().items() if key not in _DERIVED}
    parts = {key: part for key, part in vars(config).items() if isinstance(part, PretrainedConfig)}
    values = {key: value for key, value in values.items() if key not in parts}
    small = {key: _size(key, value) for key, value in values.items()}
    small |= _lists(values)
    small |= _heads(values)
    if "pad_token_id" in small and small["pad_token_id"] is None:
        small["pad_token_id"] = 0
    if small.get("eos_token_id") is not None:
        small["eos_token_id"] = END
    vocabulary = small.get("vocab_size") or VOCABULARY
    for number, key in enumerate(key for key in small if key.endswith(("_token_id", "_token_index"))):
        if isinstance(small[key], int) and small[key] >= vocabulary:
            small[key] = vocabulary - 1 - number
    return small | {key: _shrunk(part) | {"model_type": part.model_type} for key, part in parts.items()}


def _size(key: str, value: Any) -> Any:
    size = _SIZE_OF.get(key)
    if size == 0 and isinstance(value, float):  # a rate at which layers are dropped in training
        return 0.0
    if size is None or isinstance(value, bool) or not isinstance(value, int):
        return value
    return min(value, size) if size < 3 or value < size else size


def _heads(values: Mapping[str, Any]) -> dict[str, Any]:
    """As many heads for keys and values as for queries where the default has as many, and one where it has one."""
    heads = next((values[key] for key in ("num_attention_heads", "n_head", "num_heads") if values.get(key)), None)
    return {
        key: HEADS
        for key in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")
        if values.get(key) is not None and values[key] == heads
    }


def _lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer: one of each kind, where there are two kinds."""
    lengths = {values[key] for key in values if _SIZE_OF.get(key) == LAYERS and isinstance(values[key], int)}
    return {
        key: [value[0], next((other for other in value if other != value[0]), value[-1])]
        for key, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) in lengths and len(value) > LAYERS
    }
