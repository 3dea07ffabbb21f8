"""Tokens and which of them are learned. Oracle: the tokenizer on the whole text, and on the prompt alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from pico_tokenizers import Slow, byte_level, metaspace, word_piece
from tokenizers import AddedToken

from loftq.training.encoding import IGNORED, Encoder
from loftq.training.spans import beginning, tokenize

KINDS = {
    **{name: lambda name=name: metaspace(name) for name in ("first", "always", "never", "legacy", "gemma")},
    **{name: lambda name=name: byte_level(name) for name in ("qwen2", "llama-bpe", "smollm", "gpt2")},
    "word piece": word_piece,
}
# Prompts and answers whose border no token crosses in any of these tokenizers, and some where it depends.
PAIRS = [
    ("the fox\n", "over it"),
    ("the fox:", " 13"),
    ("the fox: ", "13"),
    ("over", "it"),
    ("ünï ", "ü — ü 😀"),
    ("<s>the fox<|end|>\n", "over<|end|>\n"),
    ("a</s>", " b"),
    ("a</s>", "\nb"),
    ("the fox</s>", "the over"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_tokenized_once(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, normalized=False, special=True)])
    for prompt, answer in PAIRS:
        text = f"{prompt}{answer}</s>the fox"
        ids, learned = tokenize(tokenizer, text, [(len(prompt), len(prompt + answer))])
        whole, asked, answered = (
            tokenizer(part, add_special_tokens=False).input_ids for part in (text, prompt, prompt + answer)
        )
        assert ids == whole
        if whole[: len(asked)] == asked:
            assert learned.index(True) == len(asked), (prompt, answer)
        if whole[: len(answered)] == answered:
            assert not any(learned[len(answered) :])
            assert all(learned[learned.index(True) : len(answered)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_the_whole_text(kind: str) -> None:
    """With the tokens for its beginning and end. What is learned are its last tokens."""
    tokenizer = KINDS[kind]()
    example = Encoder(tokenizer, "causal-lm", 999).pair("the fox\n", "over it, the fox")
    whole = tokenizer("the fox\nover it, the fox").input_ids
    assert example["input_ids"] == [*whole, tokenizer.eos_token_id]
    answer = [label for label in example["labels"] if label != IGNORED]
    assert answer == example["input_ids"][-len(answer) :]
    assert example["input_ids"][: -len(answer)] == tokenizer("the fox\n").input_ids


def test_a_token_over_the_border_is_learned() -> None:
    tokenizer = byte_level("gpt2")
    ids, learned = tokenize(tokenizer, "over the13", [(4, 6)])  # the end of " the" is not in the span
    tokens = tokenizer.convert_ids_to_tokens([token for token, learns in zip(ids, learned, strict=True) if learns])
    assert tokens == ["Ġthe"]


def test_a_tokenizer_without_places() -> None:
    """Pairs from the beginning of a text: those before the span stay, those that cross its borders are learned."""
    tokenizer: Any = Slow()
    assert not tokenizer.is_fast
    text = "abcdefghij"
    for start, end, want in (
        (2, 6, [1, 2]),
        (3, 6, [1, 2]),
        (2, 5, [1, 2, 3, 4]),
        (0, 10, [0, 1, 2, 3, 4]),
        (8, 10, [4]),
    ):
        ids, learned = tokenize(tokenizer, text, [(start, end)])
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
        assert [place for place, learns in enumerate(learned) if learns] == want
    assert beginning(tokenizer, "abcdef", 2).replace(" ", "") == "abcd"


@pytest.mark.parametrize("kind", KINDS)
def test_the_beginning_of_a_text(kind: str) -> None:
    """Is one, and has no more tokens than it may have."""
    tokenizer, text = KINDS[kind](), "the fox ü over it 13 — the 😀 the"
    assert beginning(tokenizer, text, 0) == ""
    assert beginning(tokenizer, text, 99) == text
    found = [beginning(tokenizer, text, count) for count in range(20)]
    assert all(text.startswith(one) for one in found)
    assert all(len(one) <= len(other) for one, other in pairwise(found))
    assert all(len(tokenizer(one, add_special_tokens=False).input_ids) <= count + 1 for count, one in enumerate(found))
