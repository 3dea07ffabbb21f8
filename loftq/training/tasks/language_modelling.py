"""Plain text in blocks; prompts and their answers; conversations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loftq.errors import OptionError
from loftq.training import encoding
from loftq.training.data import find_columns, text_of
from loftq.training.encoding import Encoder

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = {"text": ("text", "content")}  # of plain text
ROLES = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt", "instruction", "question", "context", "source"),
    "response": ("response", "completion", "output", "answer", "target"),
    "input": ("input",),
}


def pack_blocks(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Blocks of `cutoff_len` tokens, cut from all texts in their order, each with its beginning and its end.

    What is left over at the end is dropped, but where it is all there is. Raises OptionError where that is less than
    two tokens, of which nothing is learned.
    """
    from datasets import Dataset

    column = find_columns(rows, TEXT, columns)["text"]
    texts = [text for row in rows if (text := text_of(row, column))]
    ids = np.array([token for text in texts for token in encoder.document(text)], dtype=np.int32)
    if len(ids) < 2:
        raise OptionError(f"column {column!r} of the data holds no text to learn from: expected two tokens or more")
    length = min(encoder.cutoff_len, len(ids))
    blocks = ids[: len(ids) // length * length].reshape(-1, length)
    return Dataset.from_dict({"input_ids": list(blocks), "labels": list(blocks)})


def encode(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Examples of a prompt and its answer, where those are named or all there is, or else of conversations."""
    found = find_columns(rows, ROLES, columns, optional=tuple(ROLES))
    if "messages" in found and ("messages" in columns or not {"prompt", "response"} & set(columns)):
        return conversations(rows, lambda row: _messages(row, found), encoder)
    found = find_columns(rows, ROLES, columns, optional=("messages", "input"))
    if encoding.uses_template(encoder, default=True):
        return conversations(rows, lambda row: _asked(row, found), encoder)
    return encoded(rows, lambda row: encoder.pair(*_plain(row, found)))


Record = Mapping[str, Any]


def conversations(rows: Dataset, messages: Callable[[Record], list[dict[str, str]]], encoder: Encoder) -> Dataset:
    """Examples of what the chat template writes. Raises OptionError for limits of its parts: it is not taken apart."""
    limits = {"--max-source-length": encoder.max_source_length, "--max-target-length": encoder.max_target_length}
    for name, limit in limits.items():
        if limit is not None:
            raise OptionError(
                f"{name} {limit}: what a chat template writes has one limit, --cutoff-len: leave the option out, or "
                "add --no-chat-template to prompts and answers"
            )
    return encoded(rows, lambda row: encoder.conversation(encoding.turns(encoder.tokenizer, messages(row))))


def encoded(rows: Dataset, example: Callable[[Record], dict[str, list[int]]]) -> Dataset:
    """An example of each row, without those of which the limits leave nothing to learn, whose number it says.

    Raises OptionError where none is left, and with the number of a row, from 1, that makes no example.
    """

    def numbered(row: Record, at: int) -> dict[str, list[int]]:
        try:
            return example(row)
        except OptionError as error:
            raise OptionError(f"row {at + 1}: {error}") from error

    examples = rows.map(
        numbered, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False, desc="tokenize"
    )
    kept = [at for at, labels in enumerate(examples["labels"]) if any(label != encoding.IGNORED for label in labels)]
    if not kept:
        raise OptionError(
            "no example has anything to learn within the limits: raise --cutoff-len, or lower --max-source-length"
        )
    if len(kept) == len(examples):
        return examples
    left_out = f"{len(examples) - len(kept)} of {len(examples)} examples"
    print(f"{left_out} are left out: within the limits they have nothing to learn", file=sys.stderr, flush=True)
    return examples.select(kept)


def _messages(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, str]]:
    messages = row[columns["messages"]]
    try:
        found = [{"role": _ROLE.get(role, role), "content": content} for role, content in _spoken(messages)]
        if not all(isinstance(message["content"], str) for message in found):
            raise TypeError
        return found
    except (TypeError, KeyError, AttributeError) as error:
        raise OptionError(
            f"column {columns['messages']!r} of the data holds {messages!r:.80} where messages with a role and a "
            "content, a text, were expected"
        ) from error


_ROLE = {"human": "user", "gpt": "assistant"}  # as ShareGPT has them


def _spoken(messages: Any) -> Iterator[tuple[str, str]]:
    for message in messages:
        if "from" in message and message.get("role") is None:
            yield message["from"], message["value"]
        else:
            yield message["role"], message["content"]


def _asked(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, str]]:
    """A row as a conversation of one question."""
    more = row.get(columns.get("input", ""))
    prompt = text_of(row, columns["prompt"])
    return [
        {"role": "user", "content": f"{prompt}\n\n{more}" if more else prompt},
        {"role": "assistant", "content": text_of(row, columns["response"])},
    ]


def _plain(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str]:
    """A row's prompt and answer as they stand, a line apart unless white space is there already."""
    messages = _asked(row, columns)
    prompt, response = (message["content"] for message in messages)
    joint = "" if prompt[-1:].isspace() or response[:1].isspace() else "\n"
    return prompt + joint, response
