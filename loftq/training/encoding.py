"""From text to token ids and labels, as a causal or an encoder-decoder model learns them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.display import one_line
from loftq.errors import OptionError
from loftq.models.tokenizers import read_tokenizer, special_tokens

IGNORED = -100  # a label that is no loss, as torch has it
_RESERVED = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<unk>")

Piece = tuple[str, bool]  # a text, and whether it is learned


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, the limits of an example, and what sort of model reads it."""

    tokenizer: Any
    task: str  # of loftq.models.tasks.TASKS
    cutoff_len: int
    max_source_length: int | None = None
    max_target_length: int | None = None
    chat_template: bool | None = None
    labels: int = 2  # of a classifier

    @property
    def seq2seq(self) -> bool:
        """Whether source and target are read apart."""
        return self.task == "seq2seq-lm"

    @cached_property
    def _begin(self) -> list[int]:
        """What the tokenizer puts before a text."""
        return special_tokens(self.tokenizer)[0]

    @property
    def _end(self) -> list[int]:
        token = self.tokenizer.eos_token_id
        return [] if token is None else [int(token)]

    def ids(self, text: str) -> list[int]:
        """A text's tokens, with no special ones but those that are written out in it."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def document(self, text: str) -> list[int]:
        """A whole text, with its beginning and its end."""
        return [*self._begin, *self.ids(text), *self._end]

    def pair(self, prompt: str, response: str) -> dict[str, list[int]]:
        """A prompt and what is learned as its answer, each with half of the room where both are long.

        Too long a prompt loses its beginning, as when it is asked, and too long an answer its end.
        """
        if self.seq2seq:
            source = self.tokenizer(prompt, truncation=True, max_length=self._source_limit).input_ids
            target = self.tokenizer(text_target=response, truncation=True, max_length=self._target_limit).input_ids
            return {"input_ids": list(source), "labels": list(target)}
        whole = [*self.ids(response), *self._end][: self._target_limit]
        source = self.prompt(prompt, len(whole))
        target = whole[: self.cutoff_len - len(source)]
        return {"input_ids": source + target, "labels": [IGNORED] * len(source) + target}

    def prompt(self, text: str, room: int) -> list[int]:
        """A prompt that is to be answered in `room` tokens, or half of all; too long a one loses its beginning."""
        if self.seq2seq:
            return list(self.tokenizer(text, truncation=True, max_length=self._source_limit).input_ids)
        ids, most = self.ids(text), self._prompt_limit(room) - len(self._begin)
        return [*self._begin, *ids[max(len(ids) - most, 0) :]]

    def templated(self, messages: Sequence[dict[str, str]], room: int) -> list[int]:
        """A prompt as the chat template writes it, special tokens and all, to be answered in `room` tokens.

        Raises OptionError for too long a one: cut, it would lose the marks of who speaks.
        """
        ids, most = self.ids(written(self.tokenizer, messages, answer=True)), self._prompt_limit(room)
        if len(ids) > most:
            raise OptionError(
                f"a prompt of {len(ids)} tokens through the chat template, where an answer of {room} within "
                f"{self.cutoff_len} leaves it {most}: shorten it, lower --max-new-tokens, or add --no-chat-template, "
                "which cuts it"
            )
        return ids

    def conversation(self, pieces: Sequence[Piece]) -> dict[str, list[int]]:
        """What a chat template wrote, special tokens included, of which parts are learned."""
        ids: list[int] = []
        labels: list[int] = []
        for text, learned in pieces:
            found = self.ids(text)
            ids += found
            labels += found if learned else [IGNORED] * len(found)
        return {"input_ids": ids[: self.cutoff_len], "labels": labels[: self.cutoff_len]}

    def _prompt_limit(self, room: int) -> int:
        return min(self._source_limit, self.cutoff_len - min(room, self.cutoff_len // 2))

    @property
    def _source_limit(self) -> int:
        return min(self.max_source_length or self.cutoff_len, self.cutoff_len)

    @property
    def _target_limit(self) -> int:
        return min(self.max_target_length or self.cutoff_len, self.cutoff_len)


def turns(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[Piece]:
    """A conversation as the tokenizer's chat template writes it: what the assistant says is learned.

    A template may write earlier turns otherwise than the last one: then the last answer alone is learned. Raises
    OptionError for a conversation without an answer, and where the template does not write a prompt before its answer.
    """
    answers = [at for at, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers or answers[-1] != len(messages) - 1:
        raise OptionError(
            "a conversation of the data does not end with a message of the assistant: nothing to learn from"
        )
    whole = written(tokenizer, messages)
    for chosen in (answers, answers[-1:]):
        spans = [
            (written(tokenizer, messages[:at], answer=True), written(tokenizer, messages[: at + 1])) for at in chosen
        ]
        if all(whole.startswith(after) and after.startswith(before) for before, after in spans):
            break
    else:
        raise OptionError("the chat template does not begin an answer as it begins a prompt: add --no-chat-template")
    pieces: list[Piece] = []
    at = 0
    for before, after in spans:
        pieces += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
        at = len(after)
    return pieces


def written(tokenizer: Any, messages: Sequence[dict[str, str]], *, answer: bool = False) -> str:
    """Messages as the chat template writes them; `answer`: with the beginning of an answer."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer))
    except Exception as error:  # a template is a program of its own
        raise OptionError(f"the chat template refuses a conversation of the data: {one_line(error)}") from error


def uses_template(encoder: Encoder, default: bool) -> bool:
    """Whether prompts go through the chat template. Raises OptionError where one is asked for and there is none."""
    has = getattr(encoder.tokenizer, "chat_template", None) is not None and not encoder.seq2seq
    if encoder.chat_template and not has:
        raise OptionError("--chat-template: the model's tokenizer has none; leave it out")
    return has and (default if encoder.chat_template is None else encoder.chat_template)


def load_tokenizer(folder: Path, model: nn.Module) -> Any:
    """The tokenizer beside a model, with a padding token that the model's embeddings hold.

    Padding is masked in attention and in labels, so any token serves: one that is reserved where there is one, or else
    the end of text. Embeddings are never resized. Raises SourceError.
    """
    tokenizer = read_tokenizer(folder)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    config: Any = model.config
    rows = int(embeddings.weight.shape[0])
    counts_ends = config.is_encoder_decoder and tokenizer.pad_token_id == tokenizer.eos_token_id  # its classifier
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows or counts_ends:
        vocabulary = tokenizer.get_vocab()
        usable = (*_RESERVED, tokenizer.bos_token) if config.is_encoder_decoder else _RESERVED
        reserved = [token for token in usable if vocabulary.get(token, rows) < rows]
        tokenizer.pad_token = reserved[0] if reserved else tokenizer.eos_token
    for part in (config, config.get_text_config()):  # a classifier looks for the last token before the padding
        part.pad_token_id = tokenizer.pad_token_id
    if getattr(config, "type_vocab_size", 0) < 2:  # nothing that tells the texts of a pair apart
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


@dataclass(frozen=True)
class Collator:
    """Examples as a batch: padded on the right to the longest, labels with what is no loss."""

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Token ids and types, attention mask and labels: (batch, longest) int64, or labels (batch,)."""
        ids = _padded([example["input_ids"] for example in examples], self.pad_token_id)
        mask = _padded([[1] * len(example["input_ids"]) for example in examples], 0)
        labels = [example["labels"] for example in examples]
        batch = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = _padded([example["token_type_ids"] for example in examples], 0)
        if isinstance(labels[0], list):
            batch["labels"] = _padded(labels, IGNORED)
        else:
            batch["labels"] = torch.tensor(labels)
        return batch


def _padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
