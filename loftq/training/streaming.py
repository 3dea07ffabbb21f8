"""Shows an answer while the model writes it."""

from __future__ import annotations

from typing import TextIO

from transformers import TextStreamer

from loftq.models.tasks import CAUSAL
from loftq.training.ends import Ends
from loftq.training.opened import Opened


class Streamer(TextStreamer):
    """Writes each word as soon as it is complete and no beginning of an end. `shown` is what was written so far."""

    def __init__(self, opened: Opened, stream: TextIO, ends: Ends) -> None:
        skips = opened.task.name in CAUSAL  # the output of such a model begins with the prompt
        super().__init__(opened.tokenizer, skip_prompt=skips, skip_special_tokens=True)
        self._stream, self._ends = stream, ends
        self._text = self.shown = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write what is certain of the text so far, and end the line after the last piece."""
        self._text += text
        certain = self._ends.cut(self._text) if stream_end else self._ends.certain(self._text)
        print(certain[len(self.shown) :], end="\n" if stream_end else "", flush=True, file=self._stream)
        self.shown = certain
