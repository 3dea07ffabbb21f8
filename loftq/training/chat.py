"""A conversation of several turns with a model, written as the model was trained: by its chat template, if it has one.

A model without a template was trained on single prompts, so each message is answered by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from loftq.chatter import silenced
from loftq.errors import OptionError, OutputError
from loftq.models.chat_templates import write_messages
from loftq.training.process import explain_memory
from loftq.training.writer import Writer


@dataclass
class Chat:
    """A conversation: its system message, and the messages of both sides in their order."""

    writer: Writer
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, the system message first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.turns.clear()

    def ask(self, text: str, stream: TextIO) -> str | None:
        """Answer a message on a stream while the answer is written. Returns a note if the context became too long.

        If the answer is interrupted by KeyboardInterrupt, the part that was shown belongs to the conversation; if the
        message is refused, the conversation is as before. Raises OptionError.
        """
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        try:
            ids, note = self._templated() if self.writer.templated else self._alone(text)
        except BaseException:
            self.turns[:] = before
            raise
        streamer = self.writer.streamer(stream)
        try:
            with silenced(), explain_memory():
                answer = self.writer.answer(ids, streamer)
        except KeyboardInterrupt:
            self.turns.append({"role": "assistant", "content": streamer.shown.strip()})
            raise
        except BaseException:
            self.turns[:] = before
            raise
        self.turns.append({"role": "assistant", "content": answer})
        return note

    def _templated(self) -> tuple[list[int], str | None]:
        """The ids of the conversation, from which the oldest turns are taken while it is too long for the model."""
        encoder, longest = self.writer.encoder, self.writer.opened.longest
        room = min(self.writer.sampling.max_new_tokens, longest // 2)
        dropped = 0
        while True:
            ids = encoder.ids(write_messages(encoder.tokenizer, self.messages, answer=True))
            if not ids:
                raise OptionError("the chat template writes nothing for this message: use --no-chat-template")
            if len(ids) <= longest - room:
                break
            if len(self.turns) == 1:
                raise OptionError(
                    f"the message has {len(ids)} tokens with what the chat template adds, but the model reads "
                    f"{longest}, of which {room} are kept for the answer: shorten it, or lower --max-new-tokens"
                )
            del self.turns[:2]
            dropped += 1
        if not dropped:
            return ids, None
        turns = "turn was" if dropped == 1 else f"{dropped} turns were"
        return (
            ids,
            f"the conversation is longer than the {longest} tokens that the model reads: the oldest {turns} left out",
        )

    def _alone(self, text: str) -> tuple[list[int], str | None]:
        """The ids of a message without a template, as `loftq train` writes a prompt: the answer begins a new line."""
        encoder, room = self.writer.encoder, self.writer.sampling.max_new_tokens
        prompt = text if self.system is None else f"{self.system}\n{text}"
        prompt += "" if encoder.seq2seq or prompt[-1:].isspace() else "\n"
        ids = encoder.prompt(prompt, room)
        if not ids:
            raise OptionError("the message has no tokens: write a text")
        whole = len(ids) if encoder.seq2seq else len(encoder.begin) + len(encoder.ids(prompt))
        if whole <= len(ids):
            return ids, None
        return ids, f"the message is longer than the model reads: of {whole} tokens it reads the last {len(ids)}"

    def save(self, path: Path) -> None:
        """Write the conversation as one row of a .jsonl file, which `loftq train --data` reads.

        Raises OutputError if the file exists or cannot be written, OptionError if there is nothing to save.
        """
        if not self.turns:
            raise OptionError("there is nothing to save yet: the conversation has no messages")
        row: Mapping[str, object] = {"messages": self.messages}
        try:
            with path.expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except FileExistsError as error:
            raise OutputError(f"{path} exists already: name another file") from error
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}: name another file") from error
