"""Models for lm-eval. Oracle: what its own class is called with, and the message."""

from __future__ import annotations

from typing import Any

import pico_templates as templates
import pytest
import torch
from conftest import byte_tokenizer, pico_llama

from loftq.errors import SourceError
from loftq.training.harness import _checked


class _Model:
    """What lm-eval has of a model, as far as it is changed."""

    def __init__(self, tokenizer: Any) -> None:
        self.model, self.tokenizer = pico_llama(), tokenizer
        self.model.generation_config.eos_token_id = 2

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def tok_batch_encode(self, texts: list[str], **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        encoding = self.tokenizer(texts, padding=True, return_tensors="pt")
        return encoding.input_ids, encoding.attention_mask

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> dict[str, Any]:
        return {"context": context, "max_length": max_length, "stop": stop, **options}


def test_its_tokens_have_embeddings_and_its_answers_end() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = templates.CHATML
    tokenizer.add_tokens([f"<x{i}>" for i in range(80)])
    model = _checked(_Model)(tokenizer)
    assert model.tok_encode("a<x1>") == tokenizer("a<x1>").input_ids
    assert model.tok_batch_encode(["a", "b<x1>"])[0].tolist()[1] == tokenizer("b<x1>").input_ids
    for encode, given in ((model.tok_encode, "a<x79>"), (model.tok_batch_encode, ["a", "<x79>"])):
        with pytest.raises(SourceError, match="produces the token 338, but the last row"):
            encode(given)
    asked = model._model_generate("ids", 8, stop=["x"], do_sample=False)
    assert asked == {
        "context": "ids",
        "max_length": 8,
        "stop": ["x"],
        "do_sample": False,
        "eos_token_id": [2, 257, 258],
    }
    tokenizer.chat_template = templates.PLAIN_END
    assert model._model_generate("ids", 8, stop=["x"])["stop"] == ["x", "</>"]
    assert model._model_generate("ids", 8, ["x"])["stop"] == ["x", "</>"]
