"""Language modelling: plain text in blocks, prompts with answers, and conversations."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loftq.errors import OptionError
from loftq.hub.columns import find_columns, text_of
from loftq.hub.conversations import BESIDE, ROLES, Conversation, chosen_columns, conversation_of, instruction_of
from loftq.models.long_texts import tokenized_pieces
from loftq.models.tasks import CAUSAL
from loftq.training import encoding
from loftq.training.encoding import Encoder
from loftq.training.tasks.task import GENERATORS, TrainingTask

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

_log = logging.getLogger(__name__)
Record = Mapping[str, Any]
TEXT = {"text": ("text", "content")}  # the role for plain text


def pack_blocks(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Cut all texts, in their order and each with the tokens for its beginning and end, into blocks of `cutoff_len`.

    The tokens after the last whole block are dropped, unless there is no whole block. Raises OptionError for fewer than
    two tokens, from which nothing can be learned.
    """
    import numpy as np
    import pyarrow as pa  # type: ignore[import-untyped]  # datasets requires it
    from datasets import Dataset

    column = find_columns(rows, TEXT, columns)["text"]
    texts = (text for row in rows if (text := text_of(row, column)))
    ids = joined_ids(texts, encoder, encoder.begin, encoder.end)
    if len(ids) < 2:
        raise OptionError(f"column {column!r} of the data holds no text to learn from: expected at least two tokens")
    length = min(encoder.cutoff_len, len(ids))
    used = ids[: len(ids) // length * length]
    starts = np.arange(0, len(used) + 1, length, dtype=np.int64)
    blocks = pa.LargeListArray.from_arrays(starts, pa.array(used))  # (blocks, length)
    fingerprint = hashlib.sha256(used.data).hexdigest()[:16] + f"{length:x}"
    return Dataset(pa.table({"input_ids": blocks, "labels": blocks}), fingerprint=fingerprint)


def joined_ids(
    texts: Iterable[str],
    encoder: Encoder,
    begin: Sequence[int] = (),
    end: Sequence[int] = (),
    *,
    enough: int | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> np.ndarray:
    """The token ids of texts of any length, each between the special tokens `begin` and `end`: int32 (tokens).

    With `enough`, only so many, the first ones. `progress` is called with the number of characters of each piece.
    """
    import numpy as np

    ids = array("i")
    for text in texts:
        encoding.check_text(text)
        ids.extend(begin)
        for piece, piece_ids in tokenized_pieces(encoder.tokenizer, text):
            encoder.check(piece_ids)
            ids.extend(piece_ids)
            progress(len(piece))
            if enough is not None and len(ids) >= enough:
                return np.frombuffer(ids, dtype=np.int32)[:enough]
        ids.extend(end)
    return np.frombuffer(ids, dtype=np.int32) if ids else np.zeros(0, dtype=np.int32)


def encode(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Encode examples of conversations if the data has them, unless columns of prompts or answers are named.

    Otherwise encode examples of a prompt and its answer.
    """
    names = chosen_columns(rows, columns)
    read = conversation_of if "messages" in names else instruction_of
    if encoder.folder is not None and encoder.image_text is None and _has_images(rows, lambda row: read(row, names)):
        encoder = encoder.reading_images()
    if encoding.uses_template(encoder, default=True):
        return conversations(rows, lambda row: read(row, names), encoder)
    return encoded(rows, lambda row: encoder.single_turn(read(row, names)))


def _has_images(rows: Dataset, conversation: Callable[[Record], Conversation]) -> bool:
    """Whether any row has images. A row that cannot be read is reported when it is encoded."""
    for row in rows:
        try:
            if conversation(row).images:
                return True
        except OptionError:
            return False
    return False


def _used(rows: Dataset, columns: Mapping[str, str]) -> list[str]:
    return [*chosen_columns(rows, columns).values(), *BESIDE]


def conversations(rows: Dataset, conversation: Callable[[Record], Conversation], encoder: Encoder) -> Dataset:
    """Encode examples with the chat template. Raises OptionError for limits of prompts or answers alone."""
    limits = {"--max-source-length": encoder.max_source_length, "--max-target-length": encoder.max_target_length}
    for name, limit in limits.items():
        if limit is not None:
            raise OptionError(
                f"{name} {limit}: with a chat template, --cutoff-len is the only limit: leave the option out, or add "
                "--no-chat-template for prompts and answers"
            )
    features = None if encoder.image_text is None else _features()
    return encoded(rows, lambda row: encoder.talk(conversation(row)), features)


def _features() -> Any:
    """The types of the columns of examples with images, which no single example may tell."""
    from datasets import Features, Value

    ids = [Value("int64")]
    images = [{"path": Value("string"), "bytes": Value("binary")}]
    return Features({"input_ids": ids, "labels": ids, "text": Value("string"), "images": images})


def encoded(rows: Dataset, example: Callable[[Record], dict[str, Any]], features: Any = None) -> Dataset:
    """Encode an example of each row, and leave out those that have nothing to learn within the limits.

    Their number is reported on stderr. Raises OptionError if no example is left; an OptionError for a row names the
    number of the row, from 1.
    """

    def numbered(row: Record, index: int) -> dict[str, Any]:
        try:
            return example(row)
        except OptionError as error:
            raise OptionError(f"row {index + 1}: {error}") from error

    options = {"with_indices": True, "load_from_cache_file": False, "desc": "tokenize", "features": features}
    examples = rows.map(numbered, remove_columns=rows.column_names, **options)
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
    _log.warning(f"{left_out} are left out, because they have nothing to learn within the limits")
    return examples.select(kept)


TASKS = {
    "clm": TrainingTask(
        "plain text, packed into blocks of --cutoff-len tokens", CAUSAL, TEXT, pack_blocks, shuffled=False
    ),
    "sft": TrainingTask(
        "answers to prompts, or conversations; only answers add to the loss", GENERATORS, ROLES, encode, used=_used
    ),
}
