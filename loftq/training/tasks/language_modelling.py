"""Plain text in blocks; prompts and their answers; conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def pack(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Blocks of `cutoff_len` tokens, cut from all texts in their order, each with its beginning and its end.

    What is left over at the end is dropped, but where it is all there is.
    """
    from datasets import Dataset

    column = find_columns(rows, TEXT, columns)["text"]
    ids = np.concatenate([np.array(encoder.document(text_of(row, column)), dtype=np.int32) for row in rows])
    length = min(encoder.cutoff_len, len(ids))
    blocks = ids[: len(ids) // length * length].reshape(-1, length)
    return Dataset.from_dict({"input_ids": list(blocks), "labels": list(blocks)})


def encode(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Examples of a prompt and its answer, where those are named or all there is, or else of conversations."""
    found = find_columns(rows, ROLES, columns, optional=tuple(ROLES))
    if "messages" in found and ("messages" in columns or not {"prompt", "response"} & set(columns)):
        return encoded(rows, lambda row: encoder.conversation(encoding.turns(encoder.tokenizer, _messages(row, found))))
    found = find_columns(rows, ROLES, columns, optional=("messages", "input"))
    if encoding.uses_template(encoder, default=True):
        return encoded(rows, lambda row: encoder.conversation(encoding.turns(encoder.tokenizer, _asked(row, found))))
    return encoded(rows, lambda row: encoder.pair(*_plain(row, found)))


def encoded(rows: Dataset, example: Any) -> Dataset:
    """An example of each row, without those of which the limits leave nothing to learn.

    Raises OptionError where none is left.
    """
    examples = rows.map(example, remove_columns=rows.column_names, load_from_cache_file=False, desc="tokenize")
    kept = [at for at, labels in enumerate(examples["labels"]) if any(label != encoding.IGNORED for label in labels)]
    if not kept:
        raise OptionError(
            "no example has anything to learn within the limits: raise --cutoff-len, or lower --max-source-length"
        )
    return examples if len(kept) == len(examples) else examples.select(kept)


def _messages(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, str]]:
    messages = row[columns["messages"]]
    try:
        return [{"role": _ROLE.get(role, role), "content": content} for role, content in _spoken(messages)]
    except (TypeError, KeyError, AttributeError) as error:
        raise OptionError(
            f"column {columns['messages']!r} of the data holds {messages!r:.80} where messages with a role and a "
            "content were expected"
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
