"""Generates text with a model and its adapter: the answer to one prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from loftq.chatter import silenced
from loftq.errors import OptionError
from loftq.hub.conversations import Message
from loftq.training.process import explain_memory
from loftq.training.sampling import Sampling
from loftq.training.writer import open_writer


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
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    dtype: str | None = None,
    cpu: bool | None = None,
    offload: str | None = None,
    stream: TextIO | None = None,
    images: Sequence[str] = (),
) -> str:
    """Return the answer of a model to a prompt, and write it to `stream` while it is generated.

    `model` is an artifact's folder, with its own adapter unless `adapter` names a trained one, the folder of a trained
    adapter, which knows its backbone, or a full-precision or merged model. The prompt is written with the chat template
    if there is one, unless `chat_template` is False. With a temperature of 0 the model always takes the likeliest
    token. `offload` is that of `load_qlora`. `images` are files or addresses of images, which stand before the prompt.
    Raises LoftQError.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    with silenced(), explain_memory():
        writer = open_writer(
            model, adapter, sampling, chat_template=chat_template, dtype=dtype, cpu=cpu, offload=offload
        )
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        if images:
            return writer.answer_with_images(messages, images, None if stream is None else writer.streamer(stream))
        if writer.templated:
            ids = writer.encoder.templated(messages, max_new_tokens)
        else:
            ids = writer.encoder.prompt(prompt if system is None else f"{system}\n{prompt}", max_new_tokens)
            if not ids:
                raise OptionError("--prompt has no tokens: give a text")
        return writer.answer(ids, None if stream is None else writer.streamer(stream))


def read_prompt(prompt: str) -> str:
    """Return the prompt, or if it is `-`, the text on the standard input. Raises OptionError for an empty one."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise OptionError("--prompt is empty: give a text, or `-` to read it from the standard input")
    return text
