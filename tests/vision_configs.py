"""The configurations of pico models of every image-text type, and the inputs that an image is for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from conftest import SIZES

SIDE = 28  # of an image, in pixels
IMAGE = 300  # the token that stands for a part of an image

_TEXT = {**SIZES, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 5}
_HEADS = {**_TEXT, "head_dim": 16}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
}
_CLIP = {"model_type": "clip_vision_model", **_VISION}
_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION}
_PIXTRAL = {"model_type": "pixtral", **_VISION}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_PATCHED = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}
_DEEP = {**_PATCHED, "out_hidden_size": 64, "num_position_embeddings": 16}
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}


@dataclass(frozen=True)
class Pico:
    """One type: its configuration, how many tokens stand for one image, and the other inputs of an image.

    `inputs` makes them for a number of images.
    """

    config: dict[str, Any]
    tokens: int
    inputs: Callable[[int], dict[str, torch.Tensor]]
    start: tuple[int, ...] = ()  # tokens before those of an image
    text: dict[str, Any] = field(default_factory=dict)  # what the model takes for text beside ids and mask


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def _square(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(rows, 3, SIDE, SIDE)}


def _sized(rows: int) -> dict[str, torch.Tensor]:
    return {**_square(rows), "image_sizes": torch.full((rows, 2), SIDE)}


def _tiled(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(rows, 2, 3, SIDE, SIDE), "image_sizes": torch.full((rows, 2), SIDE)}


def _listed(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(rows, 1, 3, SIDE, SIDE)}


def _grid(rows: int) -> dict[str, torch.Tensor]:
    patches = _pixels(rows * 16, 3 * 2 * 14 * 14)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * rows)}


def _patches(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(rows * 16, 3, 14, 14), "image_grid_thw": torch.tensor([[1, 4, 4]] * rows)}


def _placed(rows: int) -> dict[str, torch.Tensor]:
    places = torch.tensor([[x, y] for y in range(4) for x in range(4)]).repeat(rows, 1, 1)
    return {"pixel_values": _pixels(rows, 16, 3 * 14 * 14).abs().clamp(max=1), "image_position_ids": places}


def _packed(rows: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": _pixels(rows, 16, 3 * 14 * 14),
        "spatial_shapes": torch.tensor([[4, 4]] * rows),
        "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.int64),
    }


def _crossed(rows: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": _pixels(rows, 1, 1, 3, SIDE, SIDE),
        "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(rows, 1, 1, dtype=torch.int64),
    }


def _typed(name: str) -> dict[str, Any]:
    return {name: IMAGE}


PICOS: dict[str, Pico] = {
    "llava": Pico(
        {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _CLIP, "image_token_index": IMAGE},
        4,
        _square,
    ),
    "vipllava": Pico(
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": _CLIP,
            "image_token_index": IMAGE,
            "vision_feature_layers": [-1, -2],
        },
        4,
        _square,
    ),
    "llava_next": Pico(
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": _CLIP,
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[SIDE, SIDE]],
        },
        10,
        _tiled,
    ),
    "llava_onevision": Pico(
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": _SIGLIP,
            "image_token_index": IMAGE,
            "video_token_index": 301,
            "image_grid_pinpoints": [[SIDE, SIDE]],
        },
        10,
        _tiled,
    ),
    "mistral3": Pico(
        {
            "text_config": {"model_type": "mistral", **_HEADS},
            "vision_config": _PIXTRAL,
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
        1,
        _sized,
    ),
    "idefics2": Pico(
        {
            "text_config": {"model_type": "mistral", **_HEADS},
            "vision_config": _VISION,
            "perceiver_config": {
                "hidden_size": 64,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            "image_token_id": IMAGE,
        },
        4,
        _listed,
    ),
    "idefics3": Pico(
        {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _VISION, "image_token_id": IMAGE},
        1,
        _listed,
    ),
    "smolvlm": Pico(
        {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _VISION, "image_token_id": IMAGE},
        1,
        _listed,
    ),
    "internvl": Pico(
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {**_VISION, "image_size": [SIDE, SIDE], "patch_size": [14, 14]},
            "image_token_id": IMAGE,
            "image_seq_length": 1,
        },
        1,
        _square,
    ),
    "paligemma": Pico(
        {
            "text_config": {"model_type": "gemma", **_HEADS},
            "vision_config": _SIGLIP,
            "image_token_index": IMAGE,
            "projection_dim": 64,
            "hidden_size": 64,
            "vocab_size": 320,
        },
        4,
        _square,
        text={"token_type_ids": 0},
    ),
    "gemma3": Pico(
        {
            "text_config": _HEADS,
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
            **_typed("image_token_index"),
            "boi_token_index": 301,
            "eoi_token_index": 302,
        },
        4,
        _square,
        text={"token_type_ids": 1},
    ),
    "gemma4": Pico(
        {
            "text_config": {
                **_HEADS,
                "global_head_dim": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 320,
                "num_kv_shared_layers": 0,
                "enable_moe_block": False,
            },
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 16,
                "patch_size": 14,
                "pooling_kernel_size": 2,
                "position_embedding_size": 16,
                "default_output_length": 4,
            },
            "audio_config": None,
            **_QWEN,
            "boi_token_id": 302,
            "eoi_token_id": 303,
            "audio_token_id": 304,
            "boa_token_id": 305,
            "eoa_token_index": 306,
        },
        4,
        _placed,
        text={"mm_token_type_ids": 1},
    ),
    "qwen2_vl": Pico(
        {
            "text_config": {**_TEXT, "rope_parameters": _ROPE, "max_window_layers": 2},
            "vision_config": {**_PATCHED, "embed_dim": 64},
            **_QWEN,
        },
        4,
        _grid,
        (302,),
        {"mm_token_type_ids": 1},
    ),
    "qwen2_5_vl": Pico(
        {
            "text_config": {**_TEXT, "rope_parameters": _ROPE, "max_window_layers": 2},
            "vision_config": {**_PATCHED, "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1]},
            **_QWEN,
        },
        4,
        _grid,
        (302,),
        {"mm_token_type_ids": 1},
    ),
    "qwen3_vl": Pico(
        {
            "text_config": {**_HEADS, "rope_parameters": _ROPE},
            "vision_config": {**_DEEP, "deepstack_visual_indexes": [0]},
            **_QWEN,
        },
        4,
        _grid,
        (302,),
        {"mm_token_type_ids": 1},
    ),
    "qwen3_vl_moe": Pico(
        {
            "text_config": {**_HEADS, **_ROUTED, "rope_parameters": _ROPE},
            "vision_config": {**_DEEP, "deepstack_visual_indexes": [0]},
            **_QWEN,
        },
        4,
        _grid,
        (302,),
        {"mm_token_type_ids": 1},
    ),
    "qwen3_5": Pico(
        {
            "text_config": {**_HEADS, **_LINEAR_ATTENTION, "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0}},
            "vision_config": _DEEP,
            **_QWEN,
        },
        4,
        _grid,
        (302,),
        {"mm_token_type_ids": 1},
    ),
    "glm4v": Pico(
        {
            "text_config": {**_HEADS, "rope_parameters": _ROPE},
            "vision_config": {**_PATCHED, "out_hidden_size": 64, "image_size": SIDE},
            "image_token_id": IMAGE,
            "video_token_id": 301,
            "image_start_token_id": 302,
            "image_end_token_id": 303,
            "video_start_token_id": 304,
            "video_end_token_id": 305,
        },
        4,
        _grid,
        (302,),
        {"mm_token_type_ids": 1},
    ),
    "mllama": Pico(
        {
            "text_config": {**_TEXT, "cross_attention_layers": [1]},
            "vision_config": {
                **{name: _VISION[name] for name in ("hidden_size", "intermediate_size", "image_size", "patch_size")},
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 4,
                "vision_output_dim": 128,
                "max_num_tiles": 1,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": IMAGE,
        },
        1,
        _crossed,
    ),
    "lfm2_vl": Pico(
        {
            "text_config": {
                "model_type": "lfm2",
                **_TEXT,
                "layer_types": ["conv", "full_attention"],
                "block_auto_adjust_ff_dim": False,
            },
            "vision_config": {**_SIGLIP, "model_type": "siglip2_vision_model", "num_patches": 16},
            "projector_hidden_size": 64,
            "image_token_id": IMAGE,
        },
        4,
        _packed,
    ),
    "aya_vision": Pico(
        {
            "text_config": {"model_type": "cohere2", **_HEADS},
            "vision_config": _SIGLIP,
            "image_token_index": IMAGE,
        },
        1,
        _square,
    ),
    "cohere2_vision": Pico(
        {
            "text_config": {"model_type": "cohere2", **_HEADS},
            "vision_config": _SIGLIP,
            "image_token_id": IMAGE,
            "alignment_intermediate_size": 128,
        },
        1,
        _square,
    ),
    "aria": Pico(
        {
            "text_config": {**_HEADS, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            "vision_config": {"model_type": "idefics3_vision", **_VISION},
            "projector_patch_to_query_dict": {4: 4},
            "image_token_index": IMAGE,
        },
        4,
        _square,
    ),
    "ovis2": Pico(
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {**_VISION, "vocab_size": 64, "hidden_stride": 1},
            "image_token_id": IMAGE,
            "visual_indicator_token_ids": [301, 302, 303, 304, 305],
            "vocab_size": 320,
            "hidden_size": 64,
        },
        4,
        _square,
    ),
    "kimi_k25": Pico(
        {
            "text_config": {
                "model_type": "deepseek_v3",
                **_TEXT,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 64,
                "n_routed_experts": 4,
                "n_shared_experts": 1,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "kv_lora_rank": 64,
                "q_lora_rank": 64,
                "qk_rope_head_dim": 16,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
                "first_k_dense_replace": 1,
            },
            "vision_config": {
                **{name: size for name, size in _VISION.items() if name != "image_size"},
                "pos_emb_height": 4,
                "pos_emb_width": 4,
            },
            "projection_hidden_size": 64,
            **_QWEN,
        },
        4,
        _patches,
    ),
    "llama4": Pico(
        {
            "text_config": {
                **_HEADS,
                "intermediate_size_mlp": 128,
                "num_local_experts": 4,
                "interleave_moe_layer_step": 2,
            },
            "vision_config": {
                **_VISION,
                "intermediate_size": 256,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
            "image_token_index": IMAGE,
            "boi_token_index": 301,
            "eoi_token_index": 302,
        },
        1,
        _square,
    ),
}
