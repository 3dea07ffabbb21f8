"""Packs examples of prompts and answers into rows of one length, without attention from one example to another.

A batch of examples of different lengths is padded to the longest one, and what is padded is computed for nothing. Rows
that are filled with whole examples waste little. The position of the first token of each example is 0: by this, and
because there is no attention mask, transformers tells the examples of a row apart for every way of attention that it
masks itself. A model that ignores the positions is refused.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from array import array
from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Any

import numpy as np

from loftq.errors import OptionError
from loftq.training.encoding import IGNORED
from loftq.training.lengths import sizes

if TYPE_CHECKING:
    from datasets import Dataset

_PROBE = 8  # tokens of each of two examples
_NEAR = 0.05  # relative difference of logits that rounding in 16 bits stays below
_APART = "leave --packing out"
_log = logging.getLogger(__name__)


def check_packable(examples: Dataset, model: Any) -> None:
    """Raise OptionError unless examples are texts for a decoder that takes positions."""
    if "images" in examples.column_names:
        raise OptionError(f"--packing: examples with images cannot be packed: {_APART}")
    if model.config.is_encoder_decoder or "position_ids" not in inspect.signature(model.forward).parameters:
        kind = "an encoder-decoder" if model.config.is_encoder_decoder else "a model that takes no positions"
        raise OptionError(f"--packing: {model.config.model_type} is {kind}: {_APART}")


def pack_examples(examples: Dataset, length: int) -> Dataset:
    """Pack examples into rows of at most `length` tokens: each, from the longest on, into the fullest row with room.

    `position_ids` begin at 0 in each example, whose first token is not learned: no token before it belongs to it.
    """
    import pyarrow as pa  # type: ignore[import-untyped]  # datasets requires it
    from datasets import Dataset

    rows = filled(sizes(examples), length)
    columns: dict[str, array[int]] = {name: array("q") for name in ("input_ids", "labels", "position_ids")}
    starts = [0]
    for row in rows:
        for index in row:
            example = examples[index]
            columns["input_ids"].extend(example["input_ids"])
            columns["labels"].extend([IGNORED, *example["labels"][1:]])
            columns["position_ids"].extend(range(len(example["input_ids"])))
        starts.append(len(columns["input_ids"]))
    tables = {
        name: pa.LargeListArray.from_arrays(np.array(starts), pa.array(np.frombuffer(values, dtype=np.int64)))
        for name, values in columns.items()
    }
    _log.info(f"{len(examples):,} examples are packed into {len(rows):,} rows of at most {length:,} tokens")
    digest = hashlib.sha256(b"".join(values.tobytes() for values in columns.values()))
    return Dataset(pa.table(tables), fingerprint=digest.hexdigest()[:16] + f"{length:x}")


def filled(lengths: np.ndarray, length: int) -> list[list[int]]:
    """The numbers of the examples in each row, in ascending order. A longer example has a row of its own."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens that are free, and the row: ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        tokens = int(lengths[index])
        place = bisect_left(room, (tokens, -1))
        if place == len(room):
            rows.append([])
            free, row = length, len(rows) - 1
        else:
            free, row = room.pop(place)
        rows[row].append(index)
        insort(room, (free - tokens, row))
    return [sorted(row) for row in rows]


def check_apart(model: Any) -> None:
    """Raise OptionError if an example changes what a model answers to the next one in its row."""
    import torch

    ids = torch.arange(2 * _PROBE, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    positions = torch.arange(_PROBE, device=model.device).unsqueeze(0)
    training = model.training
    with torch.no_grad():
        model.eval()
        both = model(input_ids=ids, position_ids=torch.cat([positions, positions], 1), use_cache=False).logits
        alone = model(input_ids=ids[:, _PROBE:], position_ids=positions, use_cache=False).logits
        model.train(training)
    if (both[:, _PROBE:] - alone).float().norm() > _NEAR * alone.float().norm():
        raise OptionError(f"--packing: {model.config.model_type} attends from one example to another: {_APART}")
