"""The calibration text: documents that are tokenized and cut into windows of tokens."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from loftq.errors import OptionError, SourceError
from loftq.hub.text import DEFAULT, read_text
from loftq.models.long_texts import tokenized_pieces
from loftq.models.positions import longest_input
from loftq.models.tokenizers import check_ids, embedding_rows, has_token_embeddings, read_tokenizer, special_tokens
from loftq.planning.plan import Plan
from loftq.planning.settings import CALIBRATION_TOKENS, SEQUENCE_LENGTH

MIN_TOKENS = 4096  # with fewer tokens, the second moments of thousands of inputs are mostly noise
_SURPLUS = 16  # this many times the number of tokens is read, and the windows are chosen from it


@dataclass(frozen=True)
class Calibration:
    """The text that a model is calibrated on.

    `windows` are token ids (windows, sequence length), including special tokens. Conversations with images are in
    `examples`, the inputs of the model for each, and `windows` then are all of their tokens in one row.
    """

    text: str  # its name, as given by the user
    windows: torch.Tensor
    task: str  # the task of the model, on which its answers depend
    seed: int
    text_sha256: str  # hash of the part that was read
    tokenizer_sha256: str
    notes: tuple[str, ...] = ()
    examples: tuple[Mapping[str, torch.Tensor], ...] = ()

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return self.windows.numel()

    @property
    def sequence_length(self) -> int:
        """Number of tokens in a window, or in the longest conversation."""
        lengths = [example["input_ids"].shape[1] for example in self.examples]
        return max(lengths, default=self.windows.shape[1])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that the windows and the model's answers to them depend on, except the model."""
        return {
            "task": self.task,
            "tokens": self.tokens,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "text_sha256": self.text_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "windows_sha256": hashlib.sha256(self.windows.numpy().tobytes()).hexdigest(),
        }

    @property
    def key(self) -> str:
        """A short hash of the settings, for the name of a folder."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]


def prepare(
    plan: Plan,
    text: str = DEFAULT,
    *,
    tokens: int = CALIBRATION_TOKENS,
    sequence_length: int = SEQUENCE_LENGTH,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Calibration:
    """Read a text, tokenize it with the tokenizer of a plan's model, and choose windows at random.

    Documents are joined by the tokenizer's end token, if it has one. The windows are cut from the result, and each gets
    the special tokens that the tokenizer puts around a text. Windows are `sequence_length` tokens long, or shorter if
    the model or the text requires it. Raises OptionError for a text that cannot be read or is too short, SourceError
    for a model that has no tokenizer or does not read text.
    """
    check_calibratable(plan, tokens)
    tokenizer = read_tokenizer(plan.source.folder, trust_remote_code=trust_remote_code)
    before, after = special_tokens(tokenizer)
    text_hash = hashlib.sha256()
    ids = _tokenize(tokenizer, read_text(text), _SURPLUS * tokens, text_hash)
    longest = longest_input(plan.model, tokenizer.model_max_length)
    length = min(sequence_length, longest, tokens, max(len(ids) + len(before) + len(after), 1))
    inner = max(length - len(before) - len(after), 1)
    available, requested = len(ids) // inner, tokens // length
    chosen = sorted(random.Random(seed).sample(range(available), min(available, requested)))
    if available < requested:
        reason = f"the text has {len(ids)} tokens, of which {available * inner} fill whole windows of {length}"
    else:
        reason = f"{requested * length} of {tokens} tokens fill whole windows of {length}"
    if len(chosen) * length < MIN_TOKENS:
        raise OptionError(
            f"--calibration {text}: {reason}: expected {MIN_TOKENS} or more, better {CALIBRATION_TOKENS}: use a "
            f"smaller --sequence-length, a longer text, or the text that loftq ships: --calibration {DEFAULT}"
        )
    windows = torch.tensor([[*before, *ids[i * inner : (i + 1) * inner], *after] for i in chosen], dtype=torch.int64)
    check_ids((int(windows.max()),), embedding_rows(plan.model), tokenizer)
    notes = []
    if windows.numel() < tokens:
        notes.append(f"calibrated on {windows.numel()} tokens instead of {tokens}: {reason}")
    if longest < sequence_length:
        notes.append(f"calibrated on windows of {longest} tokens, the most that the model accepts")
    return Calibration(text, windows, plan.task.name, seed, text_hash.hexdigest(), fingerprint(tokenizer), tuple(notes))


def check_calibratable(plan: Plan, tokens: int) -> None:
    """Raise OptionError for too few tokens, SourceError for a model that does not read text."""
    if tokens < MIN_TOKENS:
        raise OptionError(f"--calibration-tokens {tokens}: expected {MIN_TOKENS} or more")
    if getattr(plan.model, "main_input_name", "input_ids") != "input_ids" or not has_token_embeddings(plan.model):
        raise SourceError(
            f"{plan.source.name} does not read text, so it cannot be calibrated: quantize it without --calibration"
        )


def fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary and the special tokens."""
    parts = [sorted(tokenizer.get_vocab().items()), special_tokens(tokenizer), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tokenize(tokenizer: Any, documents: Iterable[str], enough: int, text_hash: Any) -> list[int]:
    """The token ids of documents. Reading stops when there are `enough`."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in documents:
        for piece, piece_ids in tokenized_pieces(tokenizer, document):
            text_hash.update(piece.encode())
            ids += piece_ids
            if len(ids) >= enough:
                return ids[:enough]
        text_hash.update(b"\f")
        ids += end
    return ids
