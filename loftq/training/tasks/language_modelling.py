"""Language modelling: plain text in blocks, prompts with answers, and conversations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loftq.errors import OptionError
from loftq.training import encoding
from loftq.training.conversations import Conversation, conversation_of, instruction_of
from loftq.training.data import find_columns, text_of
from loftq.training.encoding import Encoder

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = {"text": ("text", "content")}  # the role for plain text
ROLES = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt", "instruction", "question", "context", "source"),
    "response": ("response", "completion", "output", "answer", "target"),
    "input": ("input",),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools", "functions"),
}
_OPTIONAL = ("input", "system", "history", "tools")


def pack_blocks(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Cut all texts, in their order and each with the tokens for its beginning and end, into blocks of `cutoff_len`.

    The tokens after the last whole block are dropped, unless there is no whole block. Raises OptionError for fewer than
    two tokens, from which nothing can be learned.
    """
    from datasets import Dataset

    column = find_columns(rows, TEXT, columns)["text"]
    texts = [text for row in rows if (text := text_of(row, column))]
    ids = np.array([token for text in texts for token in encoder.document(text)], dtype=np.int32)
    if len(ids) < 2:
        raise OptionError(f"column {column!r} of the data holds no text to learn from: expected at least two tokens")
    length = min(encoder.cutoff_len, len(ids))
    blocks = ids[: len(ids) // length * length].reshape(-1, length)
    return Dataset.from_dict({"input_ids": list(blocks), "labels": list(blocks)})


def encode(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Encode examples of conversations if the data has them, unless columns of prompts or answers are named.

    Otherwise encode examples of a prompt and its answer.
    """
    names = find_columns(rows, ROLES, columns, optional=tuple(ROLES))
    read = conversation_of
    if "messages" not in names or ("messages" not in columns and {"prompt", "response"} & set(columns)):
        names = find_columns(rows, ROLES, columns, optional=("messages", *_OPTIONAL))
        read = instruction_of
    if encoding.uses_template(encoder, default=True):
        return conversations(rows, lambda row: read(row, names), encoder)
    return encoded(rows, lambda row: encoder.single_turn(read(row, names)))


Record = Mapping[str, Any]


def conversations(rows: Dataset, conversation: Callable[[Record], Conversation], encoder: Encoder) -> Dataset:
    """Encode examples with the chat template. Raises OptionError for limits of prompts or answers alone."""
    limits = {"--max-source-length": encoder.max_source_length, "--max-target-length": encoder.max_target_length}
    for name, limit in limits.items():
        if limit is not None:
            raise OptionError(
                f"{name} {limit}: with a chat template, --cutoff-len is the only limit: leave the option out, or add "
                "--no-chat-template for prompts and answers"
            )
    return encoded(rows, lambda row: encoder.talk(conversation(row)))


def encoded(rows: Dataset, example: Callable[[Record], dict[str, list[int]]]) -> Dataset:
    """Encode an example of each row, and leave out those that have nothing to learn within the limits.

    Their number is reported on stderr. Raises OptionError if no example is left; an OptionError for a row names the
    number of the row, from 1.
    """

    def numbered(row: Record, index: int) -> dict[str, list[int]]:
        try:
            return example(row)
        except OptionError as error:
            raise OptionError(f"row {index + 1}: {error}") from error

    examples = rows.map(
        numbered, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False, desc="tokenize"
    )
    kept = [
        index for index, labels in enumerate(examples["labels"]) if any(label != encoding.IGNORED for label in labels)
    ]
    if not kept:
        raise OptionError(
            "no example has anything to learn within the limits: raise --cutoff-len, or lower --max-source-length"
        )
    if len(kept) == len(examples):
        return examples
    left_out = f"{len(examples) - len(kept)} of {len(examples)} examples"
    print(f"{left_out} are left out, because they have nothing to learn within the limits", file=sys.stderr, flush=True)
    return examples.select(kept)
