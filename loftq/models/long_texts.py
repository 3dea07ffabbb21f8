"""The token ids of a long text, piece by piece: those of the whole text, in memory that grows with a piece.

A text is cut where its tokens do not depend on the cut: the tokens before the cut are the same whether the text goes on
or not, and a piece is tokenized together with the end of the text before it, whose tokens are then left out. Both are
checked with `_CONTEXT` characters on either side, so the ids equal those of the whole text unless a token depends on a
character that is further away. Where no such cut is found, the piece grows, at most to the whole text. No offsets are
needed, so this holds for slow tokenizers too, and for those that add a prefix to each text or cut long words.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

PIECE = 100_000  # number of characters that are tokenized at a time
_CONTEXT = 1_000  # number of characters on either side of a cut that are tokenized to check it
_TRIED = 16  # number of ends of lines, of words, and of characters at which a cut is tried


def tokenized_pieces(tokenizer: Any, text: str) -> Iterator[tuple[str, list[int]]]:
    """The pieces of a text in their order, each with its token ids. A text of at most `PIECE` characters is one piece.

    All ids in a row are those of the whole text.
    """
    start = begin = 0  # `begin` is where the context of the piece at `start` begins
    size = PIECE
    while len(text) - start > size:
        before = _ids(tokenizer, text[begin:start])
        found = _find_cut(tokenizer, text, begin, start, start + size)
        if found is None:
            size *= 2
            continue
        end, context, ids = found
        begin, ids = _settled(tokenizer, text, begin, start, end, before, ids)
        yield text[start:end], ids
        start, begin, size = end, context, PIECE
    before = _ids(tokenizer, text[begin:start])
    ids = _settled(tokenizer, text, begin, start, len(text), before, _ids(tokenizer, text[begin:]))[1]
    yield text[start:], ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    encoded = tokenizer(
        text, add_special_tokens=False, verbose=False, return_attention_mask=False, return_token_type_ids=False
    )
    return list(encoded["input_ids"])


def _find_cut(tokenizer: Any, text: str, begin: int, start: int, end: int) -> tuple[int, int, list[int]] | None:
    """The last safe cut between `start` and `end`, where its context begins, and the ids from `begin` to the cut.

    None if no cut that is tried is safe.
    """
    for cut, shifts in _cuts(text, start, end):
        if text[max(cut - _CONTEXT, 0) : cut].isspace() or text[cut : cut + _CONTEXT].isspace():
            continue  # some tokenizers join any number of spaces, and then with the next word
        ids: list[int] | None = None
        for shift in range(shifts):
            context = max(cut - _CONTEXT - shift, 0)
            inside = _ids(tokenizer, text[context:cut])
            if _ids(tokenizer, text[context : cut + _CONTEXT])[: len(inside)] != inside:
                continue
            if ids is None:
                ids = _ids(tokenizer, text[begin:cut])
            half = (len(inside) + 1) // 2
            if ids[len(ids) - half :] == inside[len(inside) - half :]:
                return cut, context, ids
    return None


def _cuts(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where a text may be cut, and how many beginnings of the context to try: at ends of lines, of words, anywhere.

    Within a long run of characters without a space, tokens may depend on where the context begins.
    """
    lines = (at + 1 for at in _found(text, "\n", start, end))
    words = _found(text, " ", start + 1, end)
    anywhere = range(end, start, -1)
    return chain(
        ((cut, 1) for cut in chain(islice(lines, _TRIED), islice(words, _TRIED)) if start < cut < len(text)),
        ((cut, _TRIED) for cut in islice(anywhere, _TRIED)),
    )


def _found(text: str, character: str, start: int, end: int) -> Iterator[int]:
    """Where a character is in a part of a text, the last one first."""
    at = text.rfind(character, start, end)
    while at >= 0:
        yield at
        at = text.rfind(character, start, at)


def _settled(
    tokenizer: Any, text: str, begin: int, start: int, end: int, before: list[int], ids: list[int]
) -> tuple[int, list[int]]:
    """Leave out the ids of the context; if they depend on what follows after all, read more of the text before it."""
    while ids[: len(before)] != before and begin > 0:
        begin = max(2 * begin - start, 0)
        before, ids = _ids(tokenizer, text[begin:start]), _ids(tokenizer, text[begin:end])
    return begin, ids[len(before) :]
