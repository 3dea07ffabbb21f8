"""Generates text with a model and its adapter: streamed to a person, or as answers to many prompts."""

from __future__ import annotations

import math
import sys
from typing import Any, TextIO

from transformers import TextStreamer, set_seed

from loftq.chatter import silenced
from loftq.errors import OptionError
from loftq.models.devices import compute_dtype, device_to_run
from loftq.models.tokenizers import embedding_rows
from loftq.models.trained_folder import with_backbone
from loftq.training import encoding
from loftq.training.answering import room_for, write_answers
from loftq.training.encoding import Encoder
from loftq.training.ends import Ends, turn_end
from loftq.training.model import find_model
from loftq.training.open_model import open_to_use
from loftq.training.opened import Opened
from loftq.training.process import explain_memory


def generate(
    model: str,
    prompt: str,
    *,
    adapter: str | None = None,
    system: str | None = None,
    chat_template: bool | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str | None = None,
    cpu: bool | None = None,
    offload: str | None = None,
    stream: TextIO | None = None,
) -> str:
    """Return the answer of a model to a prompt, and write it to `stream` while it is generated.

    `model` is an artifact's folder, with its own adapter unless `adapter` names a trained one, the folder of a trained
    adapter, which knows its backbone, or a full-precision or merged model. The prompt is written with the chat template
    if there is one, unless `chat_template` is False. With a temperature of 0 the model always takes the likeliest
    token. `offload` is that of `load_qlora`. Raises LoftQError.
    """
    if max_new_tokens < 1:
        raise OptionError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")
    if not 0 <= temperature < math.inf:
        raise OptionError(f"--temperature {temperature}: expected 0 (always the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise OptionError(f"--top-p {top_p}: expected a number above 0, at most 1")
    device = device_to_run(cpu)
    model, adapter = with_backbone(model, adapter)
    with silenced(), explain_memory():
        opened = open_to_use(find_model(model), adapter, device, compute_dtype(dtype, device), offload)
        _require_generator(opened, model)
        encoder = Encoder(
            opened.tokenizer,
            opened.task.name,
            opened.longest,
            chat_template=chat_template,
            embeddings=embedding_rows(opened.model),
        )
        ends = Ends()
        if encoding.uses_template(encoder, default=True):
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": prompt})
            ids, ends = encoder.templated(messages, max_new_tokens), turn_end(opened.tokenizer)
        else:
            ids = encoder.prompt(prompt if system is None else f"{system}\n{prompt}", max_new_tokens)
            if not ids:
                raise OptionError("--prompt has no tokens: give a text")
        set_seed(seed)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        )
        streamer = _Streamer(opened, stream, ends) if stream is not None else None
        room = room_for(opened, [ids], max_new_tokens)
        return write_answers(opened, [ids], room, ends, streamer=streamer, **sampling)[0]


class _Streamer(TextStreamer):
    """Writes each word as soon as it is complete and no beginning of an end."""

    def __init__(self, opened: Opened, stream: TextIO, ends: Ends) -> None:
        causal = opened.task.name == "causal-lm"
        super().__init__(opened.tokenizer, skip_prompt=causal, skip_special_tokens=True)
        self._stream, self._ends = stream, ends
        self._text = self._shown = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write what is certain of the text so far, and end the line after the last piece."""
        self._text += text
        certain = self._ends.cut(self._text) if stream_end else self._ends.certain(self._text)
        print(certain[len(self._shown) :], end="\n" if stream_end else "", flush=True, file=self._stream)
        self._shown = certain


def _require_generator(opened: Opened, model: str) -> None:
    if opened.task.name not in ("causal-lm", "seq2seq-lm"):
        raise OptionError(f"{model} is a {opened.task.name} model, which cannot write text: name a language model")


def read_prompt(prompt: str) -> str:
    """Return the prompt, or if it is `-`, the text on the standard input. Raises OptionError for an empty one."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise OptionError("--prompt is empty: give a text, or `-` to read it from the standard input")
    return text
