"""A model that is open to write text, with all that its answers depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from transformers import set_seed

from loftq.errors import OptionError
from loftq.hub.conversations import Message
from loftq.hub.image_messages import in_parts, with_images
from loftq.models.chat_templates import write_messages
from loftq.models.devices import compute_dtype, device_to_run
from loftq.models.image_text import ImageText, placed
from loftq.models.tasks import IMAGE_TEXT
from loftq.models.tokenizers import embedding_rows
from loftq.models.trained_folder import with_backbone
from loftq.training.answering import room_for, write_answers
from loftq.training.encoding import Encoder, uses_template
from loftq.training.ends import Ends, turn_end
from loftq.training.model import find_model
from loftq.training.open_model import open_to_use
from loftq.training.opened import Opened
from loftq.training.sampling import Sampling
from loftq.training.streaming import Streamer
from loftq.training.tasks.task import GENERATORS


@dataclass(frozen=True)
class Writer:
    """An open language model. `templated` says whether its prompts are written with the chat template."""

    opened: Opened
    encoder: Encoder
    templated: bool
    ends: Ends
    sampling: Sampling

    def answer(self, ids: Sequence[int], stream: Streamer | None = None) -> str:
        """The answer to the token ids of a prompt, without its end."""
        room = room_for(self.opened, [ids], self.sampling.max_new_tokens)
        options: dict[str, Any] = self.sampling.arguments()
        return write_answers(self.opened, [ids], room, self.ends, streamer=stream, **options)[0]

    def answer_with_images(
        self, messages: Sequence[Message], images: Sequence[str], stream: Streamer | None = None
    ) -> str:
        """The answer to messages, with images before the text of the first prompt.

        Raises OptionError for a model that reads no images, and for images that cannot be read.
        """
        if self.encoder.folder is None or not self.templated:
            why = "reads text alone" if self.encoder.folder is None else "needs its chat template for images"
            raise OptionError(f"--image {images[0]}: the model {why}: leave the option out, or name another model")
        parted, sources = with_images(messages, list(images), "--image")
        encoder = self.encoder.reading_images()
        text = write_messages(self.opened.tokenizer, in_parts(parted), answer=True)
        inputs = cast(ImageText, encoder.image_text).encode(text, sources).inputs
        ids = inputs.pop("input_ids")[0].tolist()
        encoder.check(ids)
        del inputs["attention_mask"]
        model, room = self.opened.model, room_for(self.opened, [ids], self.sampling.max_new_tokens)
        beside = placed(inputs, model.device, model.dtype)
        options: dict[str, Any] = self.sampling.arguments()
        return write_answers(self.opened, [ids], room, self.ends, streamer=stream, beside=beside, **options)[0]

    def streamer(self, stream: TextIO) -> Streamer:
        """What shows the next answer on a stream."""
        return Streamer(self.opened, stream, self.ends)


def open_writer(
    model: str,
    adapter: str | None,
    sampling: Sampling,
    *,
    chat_template: bool | None = None,
    dtype: str | None = None,
    cpu: bool | None = None,
    offload: str | None = None,
) -> Writer:
    """Open an artifact with its own or a trained adapter, a trained adapter's folder, or another model, to write text.

    Prompts are written with the chat template if there is one, unless `chat_template` is False. The random numbers of
    the process begin with the seed of `sampling`. Raises OptionError for a model that cannot write text.
    """
    device = device_to_run(cpu)
    model, adapter = with_backbone(model, adapter)
    opened = open_to_use(find_model(model), adapter, device, compute_dtype(dtype, device), offload)
    if opened.task.name not in GENERATORS:
        raise OptionError(f"{model} is a {opened.task.name} model, which cannot write text: name a language model")
    encoder = Encoder(
        opened.tokenizer,
        opened.task.name,
        opened.longest,
        chat_template=chat_template,
        embeddings=embedding_rows(opened.model),
        folder=opened.folder if opened.task.name == IMAGE_TEXT else None,
        data_folders=(Path(),),
    )
    templated = uses_template(encoder, default=True)
    set_seed(sampling.seed)
    return Writer(opened, encoder, templated, turn_end(opened.tokenizer) if templated else Ends(), sampling)
