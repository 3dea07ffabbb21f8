"""Converts text to token ids and labels for causal and encoder-decoder models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loftq.errors import OptionError
from loftq.hub.conversations import Conversation
from loftq.hub.image_messages import in_parts
from loftq.hub.images import ImageSource
from loftq.models.chat_templates import is_single_turn, write_messages
from loftq.models.image_text import ImageText, read_processor
from loftq.models.tokenizers import (
    check_ids,
    embedding_rows,
    has_token_embeddings,
    has_tokenizer,
    read_tokenizer,
    special_tokens,
)
from loftq.training.labels import Labels
from loftq.training.spans import Span, tokenize
from loftq.training.turns import Piece, check_roles, turns
from loftq.training.written import check_written

if TYPE_CHECKING:
    from torch import nn

IGNORED = -100  # torch's label for a token that adds no loss
_NEEDED = "a conversation of several turns, or with more than texts"
_RESERVED = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<unk>")

_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Encoder:
    """Encodes examples for a model: its tokenizer, its task, and the limits of an example in tokens."""

    tokenizer: Any
    task: str  # a name in loftq.models.tasks.TASKS
    cutoff_len: int
    max_source_length: int | None = None
    max_target_length: int | None = None
    chat_template: bool | None = None
    labels: Labels = field(default_factory=Labels)  # of a classifier
    embeddings: int | None = None  # number of tokens that the model has embeddings for
    folder: Path | None = None  # of a model that reads images too
    data_folders: tuple[Path, ...] = ()  # in which relative paths of images begin
    image_text: ImageText | None = None  # where the data hold images

    @property
    def seq2seq(self) -> bool:
        """Whether the model reads the source and the target separately."""
        return self.task == "seq2seq-lm"

    @cached_property
    def begin(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        return special_tokens(self.tokenizer)[0]

    @property
    def end(self) -> list[int]:
        """The token that ends a text, if the tokenizer has one."""
        token = self.tokenizer.eos_token_id
        ids = [] if token is None else [int(token)]
        self.check(ids)
        return ids

    def ids(self, text: str) -> list[int]:
        """The token ids of a text, without any special tokens that are not written in the text itself."""
        return self.learned_ids([(text, False)])[0]

    def learned_ids(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """The token ids of the text of all pieces, which is tokenized once, and whether each of them is learned."""
        text, spans = joined(pieces)
        check_text(text)
        ids, learned_tokens = tokenize(self.tokenizer, text, spans)
        self.check(ids)
        return ids, learned_tokens

    def tokens(self, *texts: str | None, **options: Any) -> Any:
        """What the tokenizer makes of a text, or of a pair, with its special tokens."""
        for text in texts:
            check_text(text or "")
        encoding = self.tokenizer(*texts, **options)
        self.check(encoding.input_ids)
        return encoding

    def check(self, ids: Sequence[int]) -> None:
        """Raise SourceError for a token that the model has no embedding for."""
        if self.embeddings is not None:
            check_ids(ids, self.embeddings, self.tokenizer)

    def pair(self, prompt: str, response: str) -> dict[str, list[int]]:
        """Encode a prompt and the response that is learned. If both are long, each gets half of the tokens.

        A prompt that is too long loses its beginning, as in generation; a response that is too long loses its end.
        """
        if self.seq2seq:
            check_text(response)
            target = self.tokens(text_target=response, truncation=True, max_length=self._target_limit).input_ids
            return {"input_ids": self.prompt(prompt, 0), "labels": list(target)}
        ids, learned = self.learned_ids([(prompt, False), (response, True)])
        border = learned.index(True) if True in learned else len(ids)
        answer = [*ids[border:], *self.end][: self._target_limit]
        source = self._cut(ids[:border], len(answer))
        target = answer[: self.cutoff_len - len(source)]
        return {"input_ids": source + target, "labels": [IGNORED] * len(source) + target}

    def prompt(self, text: str, room: int) -> list[int]:
        """Encode a prompt and leave `room` tokens for the answer, but at most half of all tokens.

        A prompt that is too long loses its beginning.
        """
        if self.seq2seq:
            return list(self.tokens(text, truncation=True, max_length=self._source_limit).input_ids)
        return self._cut(self.ids(text), room)

    def _cut(self, ids: list[int], room: int) -> list[int]:
        limit = self._prompt_limit(room) - len(self.begin)
        return [*self.begin, *ids[max(len(ids) - limit, 0) :]]

    def templated(self, messages: Sequence[dict[str, str]], room: int) -> list[int]:
        """Encode messages as the chat template writes them, and leave `room` tokens for the answer.

        Raises OptionError if the result is too long: a cut would remove the marks of who is speaking.
        """
        ids, limit = self.ids(write_messages(self.tokenizer, messages, answer=True)), self._prompt_limit(room)
        if not ids:
            raise OptionError("the chat template writes nothing for this conversation: add --no-chat-template")
        if len(ids) > limit:
            raise OptionError(
                f"the chat template writes a prompt of {len(ids)} tokens, but with an answer of {room} tokens, within "
                f"{self.cutoff_len} in all, it may have {limit}: shorten the prompt, lower --max-new-tokens, or add "
                "--no-chat-template, which cuts long prompts"
            )
        return ids

    def conversation(self, pieces: Sequence[Piece]) -> dict[str, list[int]]:
        """Encode the text that a chat template wrote, with its special tokens; only some of its pieces are learned."""
        ids, learned = self.learned_ids(pieces)
        labels = [token if learns else IGNORED for token, learns in zip(ids, learned, strict=True)]
        return {"input_ids": ids[: self.cutoff_len], "labels": labels[: self.cutoff_len]}

    def talk(self, conversation: Conversation) -> dict[str, list[int]]:
        """Encode a conversation with the chat template, which must write all of it; its answers are learned."""
        if conversation.images and self.image_text is None:
            raise OptionError(
                f"it holds images, and a {self.task} model reads text alone: name an image-text-to-text model, or "
                "remove the images"
            )
        check_roles(conversation.messages)
        if self.image_text is not None:
            conversation = replace(conversation, messages=in_parts(conversation.messages))
        check_written(self.tokenizer, conversation)
        pieces = turns(self.tokenizer, conversation.messages, conversation.variables, conversation.learned)
        if self.image_text is not None:
            return self._with_images(self.image_text, pieces, conversation.images)
        return self.conversation(pieces)

    def reading_images(self) -> Encoder:
        """The same encoder for data with images, with the processor in the folder of the model."""
        processor = read_processor(cast(Path, self.folder))
        return replace(self, image_text=ImageText(processor, self.tokenizer, self.data_folders))

    def _with_images(
        self, image_text: ImageText, pieces: Sequence[Piece], images: Sequence[ImageSource]
    ) -> dict[str, Any]:
        """Encode the text that a chat template wrote for images. If an image is cut off, nothing is learned.

        The example keeps the text and the images, from which the collator makes the model's inputs again.
        """
        text, spans = joined(pieces)
        check_text(text)
        expanded = image_text.encode(text, images)
        ids, learned = tokenize(self.tokenizer, expanded.text, expanded.moved(spans))
        if ids != expanded.inputs["input_ids"][0].tolist():
            raise OptionError("the processor writes other tokens than the tokenizer: data of this model can be texts")
        self.check(ids)
        taken = len(tokenize(self.tokenizer, expanded.text[: expanded.end], [])[0])
        fits = taken <= self.cutoff_len
        labels = [token if learns and fits else IGNORED for token, learns in zip(ids, learned, strict=True)]
        cut = {"input_ids": ids[: self.cutoff_len], "labels": labels[: self.cutoff_len]}
        return {**cut, "text": text, "images": [dict(image) for image in images]}

    def single_turn(self, conversation: Conversation) -> dict[str, list[int]]:
        """Encode a prompt and its answer without a chat template; a system message is a line before the prompt.

        The answer begins on a new line unless there is white space already. Raises OptionError for a conversation that
        needs a template.
        """
        messages = conversation.messages
        check_roles(messages)
        if not is_single_turn(messages) or conversation.variables:
            raise OptionError(f"only a chat template can write {_NEEDED}, and {self._why_no_template()}")
        *asked, response = (message["content"] for message in messages)
        prompt = "\n".join(asked)
        joint = "" if prompt[-1:].isspace() or response[:1].isspace() else "\n"
        example = self.pair(prompt + joint, response)
        if not conversation.learned[-1]:
            example["labels"] = [IGNORED] * len(example["labels"])
        return example

    def _why_no_template(self) -> str:
        if self.seq2seq:
            return "encoder-decoders have none: name data of prompts and answers"
        if getattr(self.tokenizer, "chat_template", None) is not None:
            return "--no-chat-template is set: leave the option out"
        return "the model's tokenizer has none: use a chat model, or copy the template of one into the model's folder"

    def _prompt_limit(self, room: int) -> int:
        return min(self._source_limit, self.cutoff_len - min(room, self.cutoff_len // 2))

    @property
    def _source_limit(self) -> int:
        return min(self.max_source_length or self.cutoff_len, self.cutoff_len)

    @property
    def _target_limit(self) -> int:
        return min(self.max_target_length or self.cutoff_len, self.cutoff_len)


def joined(pieces: Sequence[Piece]) -> tuple[str, list[Span]]:
    """The text of all pieces, and the places in it that are learned."""
    spans, start = [], 0
    for piece, learned in pieces:
        spans += [(start, start + len(piece))] if learned else []
        start += len(piece)
    return "".join(piece for piece, _ in pieces), spans


def check_text(text: str) -> None:
    """Raise OptionError for a text that no tokenizer takes, because it holds half of a surrogate pair."""
    if not text.isascii() and _SURROGATE.search(text):
        raise OptionError(f"{text!r:.80} holds half of a surrogate pair, which is not valid text: correct it")


def uses_template(encoder: Encoder, default: bool) -> bool:
    """Whether prompts are written with the chat template. Raises OptionError if it is requested but does not exist.

    Also raises OptionError for an empty template.
    """
    template = getattr(encoder.tokenizer, "chat_template", None)
    has = template is not None and not encoder.seq2seq
    if encoder.chat_template and not has:
        raise OptionError("--chat-template: the model's tokenizer has no chat template: leave the option out")
    used = has and (default if encoder.chat_template is None else encoder.chat_template)
    if used and not str(template).strip():
        raise OptionError(
            "the model's chat template is empty: add --no-chat-template for single prompts, or copy the template of "
            "the original model"
        )
    return used


def load_tokenizer(folder: Path, model: nn.Module, adapter: str | None = None) -> Any:
    """Load the tokenizer of a model, with a padding token that the model's embeddings include.

    The folder of an adapter may have its own, with the chat template and the tokens that the adapter was trained on.

    Padding is masked in attention and in labels, so any token can serve: a reserved one if there is one, otherwise the
    end of text. Embeddings are never resized. Raises SourceError.
    """
    trained = adapter is not None and has_tokenizer(Path(adapter))
    tokenizer = read_tokenizer(Path(str(adapter)) if trained else folder)
    if not has_token_embeddings(model):  # a model of images or sound
        return tokenizer
    config: Any = model.config
    rows = embedding_rows(model)
    # The classifier of an encoder-decoder looks for the end of text, so padding must be another token.
    pads_with_end = config.is_encoder_decoder and tokenizer.pad_token_id == tokenizer.eos_token_id
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows or pads_with_end:
        vocabulary = tokenizer.get_vocab()
        usable = (*_RESERVED, tokenizer.bos_token) if config.is_encoder_decoder else _RESERVED
        reserved = [token for token in usable if vocabulary.get(token, rows) < rows]
        tokenizer.pad_token = reserved[0] if reserved else tokenizer.eos_token
    for part in (config, config.get_text_config()):  # a classifier looks for the last token before the padding
        part.pad_token_id = tokenizer.pad_token_id
    if getattr(config, "type_vocab_size", 0) < 2:  # the model has no token types
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer
