"""The metadata of a model in a GGUF file: its architecture, hyperparameters and rotary embedding.

A model type of transformers has a row in ARCHITECTURES if llama.cpp computes the same from the same tensors with other
names. Rotary scaling of type `linear` and `yarn` is written as metadata. Scaling of type `llama3` is written as a
tensor of divisors of the frequencies, one for each pair i of the d dimensions of a head, whose wavelength is
λ = 2π · theta^(2i/d) positions:

    smooth  = (original / λ − low) / (high − low), between 0 and 1
    divisor = 1 / ((1 − smooth) / factor + smooth)

Sliding windows are not written. Instead, the context length is limited to the window, within which nothing differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loftq.errors import OptionError, UnknownNameError

ROPE_FREQUENCIES = "rope_freqs.weight"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_YARN_EXTRAS = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")


@dataclass(frozen=True)
class Architecture:
    """A model type of llama.cpp, and whether its rotary embedding pairs neighbours instead of halves of a head."""

    name: str
    neighbours: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", neighbours=True),
    "mistral": Architecture("llama", neighbours=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The row of a model, from its `config.json`. Raises UnknownNameError if the model type has no row."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UnknownNameError("model type for --to gguf-q4_1", kind, ARCHITECTURES)
    return ARCHITECTURES[kind]


def rotary_order(name: str, rows: int, config: Mapping[str, Any]) -> torch.Tensor | None:
    """The row of transformers' q_proj or k_proj for each row of the file; None for tensors whose rows keep their order.

    Within a head, rows 0, 1, …, d/2 − 1, d/2, … are written in the order 0, d/2, 1, d/2 + 1, ….
    """
    heads = {".attn_q.": _heads(config), ".attn_k.": _key_heads(config)}
    counts = [count for part, count in heads.items() if part in name]
    if not counts or not architecture(config).neighbours:
        return None
    return torch.arange(rows).view(counts[0], 2, -1).transpose(1, 2).reshape(-1)  # (heads, halves, pairs)


def add_metadata(writer: Any, config: Mapping[str, Any], name: str) -> None:
    """Write the metadata that llama.cpp and transformers need to build the model."""
    import gguf

    head = _head_size(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("Mistral" if name == "mistral" else name)  # transformers takes "mistral" for an architecture
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(_context(config))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(_heads(config))
    writer.add_head_count_kv(_key_heads(config))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(head)
    _add_rope(writer, config)


def rope_factors(config: Mapping[str, Any]) -> list[float] | None:
    """The divisors of the rotary frequencies for scaling of type `llama3`. Raises OptionError for unknown types."""
    rope = _rope(config)
    kind = _rope_type(rope)
    if kind not in ROPE_TYPES:
        raise UnknownNameError("rotary scaling for --to gguf-q4_1", kind, ROPE_TYPES)
    extras = [key for key in _YARN_EXTRAS if kind == "yarn" and rope.get(key) is not None]
    if extras:
        raise OptionError(f"--to gguf-q4_1 cannot store rotary scaling with {extras[0]!r}: use --to mlx")
    if kind != "llama3":
        return None
    head, theta = _head_size(config), float(rope["rope_theta"])
    return [_divisor(2 * math.pi * theta ** (2 * i / head), rope) for i in range(head // 2)]


def _divisor(wavelength: float, rope: Mapping[str, Any]) -> float:
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    smooth = (float(rope["original_max_position_embeddings"]) / wavelength - low) / (high - low)
    smooth = min(max(smooth, 0.0), 1.0)
    return 1 / ((1 - smooth) / float(rope["factor"]) + smooth)


def _add_rope(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = _rope_type(rope)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the rotary embedding, in the entry of transformers 5 (`rope_parameters`) or of older versions."""
    rope = {"rope_theta": config.get("rope_theta")} | (config.get("rope_scaling") or {})
    rope |= config.get("rope_parameters") or {}
    return rope | {"rope_theta": rope["rope_theta"] or 10000.0}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _context(config: Mapping[str, Any]) -> int:
    length, window = int(config["max_position_embeddings"]), config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", True):
        return length
    return min(length, int(window))


def _heads(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"])


def _key_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or _heads(config))


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // _heads(config))
