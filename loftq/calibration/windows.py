"""Text to calibrate on: documents, cut into windows of tokens as a model reads them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from loftq.errors import OptionError, SourceError
from loftq.hub.text import DEFAULT, read_text
from loftq.models.positions import longest_input
from loftq.models.tokenizers import read_tokenizer, special_tokens
from loftq.planning.plan import Plan
from loftq.planning.settings import CALIBRATION_TOKENS, SEQUENCE_LENGTH

MIN_TOKENS = 4096  # below, second moments of some thousand inputs are noise
_SURPLUS = 16  # how much more text than asked for is read, to choose windows from
_PIECE = 100_000  # characters that are tokenized at a time


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on. `windows` are token ids (windows, sequence length), special tokens included."""

    text: str  # as it was named
    windows: torch.Tensor
    task: str  # of the model, on which its answers depend
    seed: int
    text_sha256: str  # of what was read of it
    tokenizer_sha256: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.windows.numel()

    @property
    def sequence_length(self) -> int:
        """Tokens of a window."""
        return self.windows.shape[1]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that the windows depend on, and the kind of the answers to them."""
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
        """A short name of the settings, for a folder."""
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
    """Read a text, tokenize it as a plan's model does, and choose windows at random.

    Documents are joined by the tokenizer's end token, where it has one, and the windows are cut from that; each gets
    the special tokens that the tokenizer puts around a text. They are as long as asked for, or as model and text
    allow. Raises OptionError for a text that cannot be read or is too short, SourceError for a model that has no
    tokenizer or does not read text.
    """
    check_calibratable(plan, tokens)
    tokenizer = read_tokenizer(plan.source.folder, trust_remote_code=trust_remote_code)
    before, after = special_tokens(tokenizer)
    hashed = hashlib.sha256()
    ids = _tokenize(tokenizer, read_text(text), _SURPLUS * tokens, hashed)
    longest = longest_input(plan.model, tokenizer.model_max_length)
    length = min(sequence_length, longest, tokens, max(len(ids) + len(before) + len(after), 1))
    inner = max(length - len(before) - len(after), 1)
    available, wanted = len(ids) // inner, tokens // length
    chosen = sorted(random.Random(seed).sample(range(available), min(available, wanted)))
    if available < wanted:
        filled = f"the text has {len(ids)} tokens, of which {available * inner} fill whole windows of {length}"
    else:
        filled = f"of {tokens} tokens {wanted * length} fill whole windows of {length}"
    if len(chosen) * length < MIN_TOKENS:
        raise OptionError(
            f"--calibration {text}: {filled}: expected {MIN_TOKENS} or more, better {CALIBRATION_TOKENS}: use a "
            f"smaller --sequence-length, a longer text, or the one that is shipped: --calibration {DEFAULT}"
        )
    windows = torch.tensor([[*before, *ids[i * inner : (i + 1) * inner], *after] for i in chosen], dtype=torch.int64)
    _check_ids(plan, windows)
    notes = []
    if windows.numel() < tokens:
        notes.append(f"calibrated on {windows.numel()} tokens of the {tokens} that were asked for: {filled}")
    if longest < sequence_length:
        notes.append(f"calibrated on windows of {longest} tokens: the model takes no more")
    return Calibration(text, windows, plan.task.name, seed, hashed.hexdigest(), _fingerprint(tokenizer), tuple(notes))


def check_calibratable(plan: Plan, tokens: int) -> None:
    """Raise OptionError for too few tokens, SourceError for a model that does not read text."""
    if tokens < MIN_TOKENS:
        raise OptionError(f"--calibration-tokens {tokens}: expected {MIN_TOKENS} or more")
    if getattr(plan.model, "main_input_name", "input_ids") != "input_ids":
        raise SourceError(f"{plan.source.name} does not read text, which is all that it could be calibrated on")


def _fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary and the special tokens."""
    parts = [sorted(tokenizer.get_vocab().items()), special_tokens(tokenizer), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tokenize(tokenizer: Any, documents: Iterable[str], enough: int, hashed: Any) -> list[int]:
    """The ids of documents, until there are enough."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in documents:
        for piece in _pieces(document):
            hashed.update(piece.encode())
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= enough:
                return ids[:enough]
        hashed.update(b"\f")
        ids += end
    return ids


def _pieces(document: str) -> Iterator[str]:
    """A document, cut at the ends of lines where it is long."""
    start = 0
    while len(document) - start > _PIECE:
        end = document.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield document[start:end]
        start = end
    yield document[start:]


def _check_ids(plan: Plan, windows: torch.Tensor) -> None:
    embeddings: Any = plan.model.get_input_embeddings()  # type: ignore[operator]
    rows, largest = int(embeddings.weight.shape[0]), int(windows.max())
    if largest >= rows:
        raise SourceError(
            f"the tokenizer in {plan.source.folder} gives the token {largest}, and the model's embeddings end at "
            f"{rows - 1}: it belongs to another model: copy the right one there"
        )
