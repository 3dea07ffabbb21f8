"""How many tokens a model takes at once."""

from __future__ import annotations

from typing import Any

_MOST = 1_000_000  # tokens, where neither the model nor its tokenizer has a limit


def longest_input(model: Any, tokenizer_limit: int | None = None) -> int:
    """The most tokens that a model has positions for, and that its tokenizer allows (`model_max_length`).

    The model may be on the meta device, quantized, or peft's. RoBERTa and its relatives give the first token the
    position behind the padding token's id, so their embeddings hold fewer tokens than `max_position_embeddings`.
    """
    from torch import nn

    limits = [_MOST, tokenizer_limit, getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        counts_positions = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if counts_positions and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(int(limit) for limit in limits if limit is not None and limit > 0)
