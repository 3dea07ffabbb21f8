"""The tokenizer beside a model. Oracle: what the tokenizer itself makes of a text, and how it was built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, pico_llama
from pico_tokenizers import byte_level, sentence_piece
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from loftq.errors import SourceError
from loftq.models.tokenizers import check_ids, embedding_rows, read_tokenizer, special_tokens


def _around() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> $B </s>", [("<s>", 256), ("</s>", 257)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "before", "after"),
    [
        (byte_tokenizer(), [], []),
        (_around(), ["<s>"], ["</s>"]),
        (byte_level("llama-bpe"), ["<|begin|>"], []),
        (byte_level("qwen2"), [], []),
        (sentence_piece(), ["<s>"], []),
    ],
)
def test_special_tokens_stand_around_a_text(
    tokenizer: PreTrainedTokenizerFast, before: list[str], after: list[str], tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    found = special_tokens(read_tokenizer(tmp_path))
    assert found == (tokenizer.convert_tokens_to_ids(before), tokenizer.convert_tokens_to_ids(after))


def test_a_folder_without_a_tokenizer_is_refused(pico: Path, tmp_path: Path) -> None:
    """Also where transformers would make an empty one from the model's config."""
    (tmp_path / "config.json").write_bytes((pico / "config.json").read_bytes())
    match = f"{tmp_path} has no tokenizer that can be loaded: copy the tokenizer's files of the original model there"
    with pytest.raises(SourceError, match=f"{match}$"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match=rf"{match} \(.+\)$"):
        read_tokenizer(tmp_path)


def test_a_token_has_an_embedding() -> None:
    """Oracle: torch's embedding, which refuses the first token behind its rows."""
    model, tokenizer = pico_llama(), byte_tokenizer()
    rows = embedding_rows(model)
    tokenizer.add_tokens([f"<x{i}>" for i in range(rows)])
    for token in (0, rows - 1):
        check_ids([3, token], rows, tokenizer)
        model.get_input_embeddings()(torch.tensor([token]))
    check_ids([], rows, tokenizer)
    with pytest.raises(IndexError):
        model.get_input_embeddings()(torch.tensor([rows]))
    name = tokenizer.convert_ids_to_tokens(rows)
    with pytest.raises(SourceError, match=f"produces the token {rows}, but the last row .* is {rows - 1}: .*'{name}'"):
        check_ids([rows, 3], rows, tokenizer)
