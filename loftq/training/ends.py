"""What ends an answer: the tokens that the model knows as ends, and what the chat template writes after an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loftq.errors import OptionError
from loftq.models.chat_templates import write_messages

_ANSWER, _NEXT = "An answer.", "Another question."


@dataclass(frozen=True)
class Ends:
    """Tokens or texts that end an answer beside the tokens that the model knows as ends."""

    tokens: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    written: tuple[str, ...] = ()  # how the tokens are written, if they are not special
    space: str = ""  # white space that a template writes before the end

    def cut(self, text: str) -> str:
        """An answer without its end."""
        for end in (*self.texts, *self.written):
            text = text.partition(end)[0]
        return text.removesuffix(self.space) if self.space else text

    def certain(self, text: str) -> str:
        """The part of an unfinished answer that is no beginning of its end."""
        text = self.cut(text)
        for end in (*self.texts, *self.written):
            for beginning in (self.space + end, end):
                sizes = range(len(beginning) - 1, 0, -1)
                text = text[: len(text) - next((size for size in sizes if text.endswith(beginning[:size])), 0)]
        return text


def turn_end(tokenizer: Any) -> Ends:
    """What the tokenizer's chat template writes after an answer; nothing if there is no template.

    The end is a token if it begins with one of the tokens that were added to the vocabulary, otherwise a text. If the
    template writes only white space, an answer ends where the next message begins.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return Ends()
    talk = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _ANSWER}]
    try:
        after = write_messages(tokenizer, talk).rpartition(_ANSWER)[2]
        end = after.lstrip()
        if not end:
            longer = write_messages(tokenizer, [*talk, {"role": "user", "content": _NEXT}])
            after = longer.partition(_ANSWER)[2].partition(_NEXT)[0]
            return Ends(texts=(after.rstrip(),)) if after.strip() else Ends()
    except OptionError:  # the template refuses so plain a conversation
        return Ends()
    added = tokenizer.get_added_vocab()
    token = max((token for token in added if token and end.startswith(token)), key=len, default=None)
    space = after[: len(after) - len(end)]
    if token is None:
        places = [end.find(token) for token in added if token and token in end]
        return Ends(texts=(end[: min(places, default=len(end))].rstrip(),), space=space)
    return Ends((int(added[token]),), (), (token,), space)


def all_ends(model: Any, tokenizer: Any, ends: Ends) -> list[int]:
    """The tokens that end an answer, by the settings of the model's generation, its tokenizer, and `ends`."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    tokens = [*configured] if isinstance(configured, (list, tuple)) else [configured]
    return list(dict.fromkeys(token for token in [*tokens, tokenizer.eos_token_id, *ends.tokens] if token is not None))
