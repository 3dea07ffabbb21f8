"""Conversations with images to calibrate on: as a chat template and the processor of a model write them.

Rows hold conversations as for a training. Each conversation is a batch of its own, because images of different sizes
take different numbers of tokens, and padding would count as inputs.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

import torch

from loftq.calibration.windows import MIN_TOKENS, Calibration, check_calibratable, fingerprint
from loftq.errors import OptionError
from loftq.hub.conversations import Conversation, chosen_columns, conversation_of, instruction_of
from loftq.hub.image_messages import in_parts
from loftq.hub.images import folders_of
from loftq.hub.text import read_records
from loftq.models.chat_templates import write_messages
from loftq.models.image_text import ImageText, read_processor
from loftq.models.positions import longest_input
from loftq.models.tasks import IMAGE_TEXT
from loftq.models.tokenizers import check_ids, embedding_rows, read_tokenizer
from loftq.planning.plan import Plan

_ROWS = 4096  # rows that are read at most, and from which the conversations are chosen

Inputs = Mapping[str, torch.Tensor]


def prepare_conversations(
    plan: Plan, text: str, *, tokens: int, sequence_length: int, seed: int, trust_remote_code: bool = False
) -> Calibration | None:
    """Choose conversations at random, up to a number of tokens; None for a text, or for a model that reads no images.

    A conversation that is longer than `sequence_length` is cut after it, and left out if an image would be cut. Raises
    OptionError for rows and images that cannot be read, and for too few tokens.
    """
    records = read_records(text) if plan.task.name == IMAGE_TEXT else None
    talks = None if records is None else _conversations(records, text)
    if talks is None:
        return None
    check_calibratable(plan, tokens)
    tokenizer = read_tokenizer(plan.source.folder, trust_remote_code=trust_remote_code)
    processor = read_processor(plan.source.folder, trust_remote_code=trust_remote_code)
    image_text = ImageText(processor, tokenizer, folders_of([text]))
    if tokenizer.chat_template is None:
        raise OptionError(
            f"--calibration {text}: holds conversations, and {plan.source.name} has no chat template: use a text, or "
            "copy the template of a chat model there"
        )
    numbered = list(enumerate(islice(talks, _ROWS), 1))
    random.Random(seed).shuffle(numbered)
    length = min(sequence_length, longest_input(plan.model, tokenizer.model_max_length))
    chosen: list[Inputs] = []
    count = left_out = 0
    for number, talk in numbered:
        try:
            inputs = _inputs(image_text, tokenizer, talk, length)
        except OptionError as error:
            raise OptionError(f"--calibration {text}: row {number}: {error}") from error
        if inputs is None:
            left_out += 1
            continue
        chosen.append(inputs)
        count += inputs["input_ids"].numel()
        if count >= tokens:
            break
    if count < MIN_TOKENS:
        raise OptionError(
            f"--calibration {text}: {len(chosen)} conversations with {count} tokens ({left_out} more are longer than "
            f"{length} tokens): expected {MIN_TOKENS} tokens or more: use more rows, or a larger --sequence-length"
        )
    check_ids([int(inputs["input_ids"].max()) for inputs in chosen], embedding_rows(plan.model), tokenizer)
    notes = ["calibrated on conversations with images, so the adapter is not refined, which takes text alone"]
    if left_out:
        notes.append(f"{left_out} conversations are longer than {length} tokens, and were left out")
    digest = _digest(chosen)
    ids = torch.cat([inputs["input_ids"].flatten() for inputs in chosen])[None]
    return Calibration(text, ids, plan.task.name, seed, digest, fingerprint(tokenizer), tuple(notes), tuple(chosen))


def _conversations(records: Iterator[Mapping[str, Any]], text: str) -> Iterator[Conversation] | None:
    """The conversations of rows; None for rows that hold a text each."""
    first = next(records, None)
    if first is None or isinstance(first.get("text"), str):
        return None
    try:
        names = chosen_columns(SimpleNamespace(column_names=list(first)), {})
    except OptionError:
        return None
    read = conversation_of if "messages" in names else instruction_of

    def conversation(number: int, row: Mapping[str, Any]) -> Conversation:
        try:
            return read(row, names)
        except (OptionError, KeyError) as error:
            raise OptionError(f"--calibration {text}: row {number}: {error}") from error

    return (conversation(number, row) for number, row in enumerate(chain([first], records), 1))


def _inputs(image_text: ImageText, tokenizer: Any, talk: Conversation, length: int) -> Inputs | None:
    """The inputs of a model for a conversation, cut after `length` tokens; None if an image would be cut."""
    written = write_messages(tokenizer, in_parts(talk.messages), variables=talk.variables)
    expanded = image_text.encode(written, talk.images)
    inputs = expanded.inputs
    whole = inputs["input_ids"].shape[1]
    if whole <= length:
        return inputs
    before = tokenizer(expanded.text[: expanded.end], add_special_tokens=False)["input_ids"]
    if len(before) > length:
        return None
    of_text = {name for name, tensor in inputs.items() if tensor.shape[:2] == (1, whole)}
    return {name: tensor[:, :length] if name in of_text else tensor for name, tensor in inputs.items()}


def _digest(chosen: list[Inputs]) -> str:
    digest = hashlib.sha256()
    for inputs in chosen:
        for name, tensor in sorted(inputs.items()):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
