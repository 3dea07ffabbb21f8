"""Tokenizes a text once and finds the tokens that are learned by the characters that they stand for.

A text that is tokenized in pieces has other tokens than the whole: SentencePiece puts a space before every piece, and
merges do not cross a border. So the whole text is tokenized, and a token is learned if any of its characters is. A
token that holds the end of a prompt and the beginning of an answer is therefore learned. Where no token does, the
tokens of the prompt alone are the beginning of those of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]  # the first character, and the one after the last


def tokenize(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """Return the token ids of a text, without special tokens around it, and whether each lies in a span."""
    offsets = None
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoding["input_ids"]), encoding.get("offset_mapping")
    if offsets is None:
        ids = _ids(tokenizer, text)
        return ids, _learned_by_parts(tokenizer, text, spans, ids)
    return ids, _learned_by_offsets(offsets, spans, len(text))


def beginning(tokenizer: Any, text: str, count: int) -> str:
    """Return the beginning of a text that its first `count` tokens stand for."""
    if count <= 0:
        return ""
    if not getattr(tokenizer, "is_fast", False):
        return str(tokenizer.decode(_ids(tokenizer, text)[:count]))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoding["offset_mapping"]
    if len(offsets) <= count:
        return text
    # A character may have several tokens, and then is cut off with the last of them.
    return text[: min(offsets[count][0], offsets[count - 1][1])]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _learned_by_offsets(offsets: Sequence[Span], spans: Sequence[Span], length: int) -> list[bool]:
    """Whether each token has a character in a span.

    Some tokenizers leave spaces out of the offsets, and a token of nothing but spaces then begins where it ends: it
    stands for the characters after the last token. A token that stands for no character, such as a space that
    SentencePiece adds, belongs to the character that follows.
    """
    inside = bytearray(length + 1)
    for start, end in spans:
        inside[start:end] = b"\1" * (end - start)
    learned, last = [], 0
    for start, end in offsets:
        first = start if start < end else min(last, start)
        learned.append(1 in inside[first : max(end, first + 1)])
        last = end
    return learned


def _learned_by_parts(tokenizer: Any, text: str, spans: Sequence[Span], ids: Sequence[int]) -> list[bool]:
    """The same for a tokenizer without offsets, by the tokens of the text before and after each span.

    The tokens that both have in common with the whole lie outside the span. A token beside a border that changes with
    the text on its other side counts as learned.
    """
    learned = [False] * len(ids)
    for start, end in spans:
        first = in_common(_ids(tokenizer, text[:start]), ids)
        after = in_common(_ids(tokenizer, text[end:])[::-1], ids[::-1])
        for place in range(first, len(ids) - after):
            learned[place] = True
    return learned


def in_common(part: Sequence[Any], whole: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    count = 0
    for one, other in zip(part, whole, strict=False):
        if one != other:
            break
        count += 1
    return count
