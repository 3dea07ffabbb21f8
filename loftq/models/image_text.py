"""Encodes texts with images by the processor of a model, which puts many tokens in the place of an image.

A chat template writes a placeholder for each image. The processor replaces it by as many tokens as the image takes, and
tokenizes the text that results. A place in the text of the template is found again in the longer text by the pieces
between the placeholders, which the processor leaves as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any, cast

from loftq.display import one_line
from loftq.errors import OptionError, SourceError
from loftq.hub.images import ImageSource, open_image

if TYPE_CHECKING:
    import torch

Span = tuple[int, int]
_FILES = ("preprocessor_config.json", "processor_config.json")
_PLACEHOLDERS = ("image_token", "boi_token", "image_start_token")  # attributes of processors and tokenizers
_INSTALL = "pip install 'loftq[vision]'"


def has_processor(folder: Path) -> bool:
    """Whether a model's folder has the files of a processor of images."""
    return any((folder / name).is_file() for name in _FILES)


def read_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The processor in a model's folder, as transformers loads it.

    Raises SourceError if there is none, and OptionError if a package that it needs is missing.
    """
    from transformers import AutoProcessor

    if not has_processor(folder):
        raise SourceError(
            f"{folder} has no processor of images ({' or '.join(_FILES)}): copy the processor's files of the original "
            "model there"
        )
    lacking = [name for name in ("PIL", "torchvision") if not _is_installed(name)]
    try:
        processor: Any = cast(Any, AutoProcessor).from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a processor's own class may raise anything
        if lacking and not isinstance(error, OSError):
            raise OptionError(
                f"the processor in {folder} needs {' and '.join(lacking)}: {_INSTALL} ({one_line(error, 120)})"
            ) from error
        raise SourceError(f"the processor in {folder} cannot be loaded ({one_line(error, 200)})") from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise SourceError(f"the processor in {folder} ({type(processor).__name__}) does not read texts with images")
    return processor


def placed(inputs: Mapping[str, torch.Tensor], device: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs of a model on its device, with images in its dtype."""
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()}


def copy_processor(folder: Path, output: Path) -> None:
    """Copy the settings of the processor in a model's folder, if there is one, beside an adapter."""
    for path in folder.glob("*processor_config.json"):
        copyfile(path, output / path.name)


def _is_installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


@dataclass(frozen=True)
class Expanded:
    """The inputs of a model for one text with images: each tensor with a dimension for the text, and the longer text.

    `shifts` are the pieces of the template's text that are in the longer text too: begin, end, and their new place.
    """

    inputs: dict[str, torch.Tensor]
    text: str
    shifts: tuple[tuple[int, int, int], ...]

    @property
    def end(self) -> int:
        """The place in the longer text after the last image."""
        return self.shifts[-1][2]

    def moved(self, spans: Sequence[Span]) -> list[Span]:
        """Spans of the template's text as spans of the longer text. Raises OptionError for one with an image in it."""
        found = []
        for start, end in spans:
            piece = next((piece for piece in self.shifts if piece[0] <= start and end <= piece[1]), None)
            if piece is None:
                raise OptionError("an answer holds an image, which cannot be learned: remove it")
            found.append((start - piece[0] + piece[2], end - piece[0] + piece[2]))
        return found


class ImageText:
    """Encodes texts with images for a model. The tokenizer takes the chat template of the processor if it has none."""

    def __init__(self, processor: Any, tokenizer: Any, folders: Sequence[Path] = ()) -> None:
        self._processor, self._tokenizer, self._folders = processor, tokenizer, tuple(folders)
        if tokenizer.chat_template is None and getattr(processor, "chat_template", None):
            tokenizer.chat_template = processor.chat_template
        places = (getattr(owner, name, None) for owner in (processor, tokenizer) for name in _PLACEHOLDERS)
        self._placeholders = [place for place in dict.fromkeys(places) if isinstance(place, str) and place]

    def encode(self, text: str, images: Sequence[ImageSource]) -> Expanded:
        """The inputs for a text that a template wrote. Raises OptionError for images that cannot be read or placed."""
        recorder = _Recorder(self._tokenizer)
        inputs = self._run(recorder, [text], [images])
        longer = recorder.text
        return Expanded(inputs, longer, self._shifts(text, longer, len(images)))

    def batch(self, texts: Sequence[str], images: Sequence[Sequence[ImageSource]]) -> dict[str, torch.Tensor]:
        """The inputs for several texts, padded on the right."""
        return self._run(self._tokenizer, list(texts), images)

    def _run(
        self, tokenizer: Any, texts: list[str], images: Sequence[Sequence[ImageSource]]
    ) -> dict[str, torch.Tensor]:
        opened = [[open_image(source, self._folders) for source in sources] for sources in images]
        processor = self._processor
        processor.tokenizer = tokenizer
        try:
            inputs = processor(
                text=texts,
                images=opened if any(opened) else None,
                add_special_tokens=False,
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
        except Exception as error:  # a processor is code of its own and may raise any error
            raise OptionError(
                f"{type(processor).__name__} refuses a text with its images: {one_line(error, 300)}"
            ) from error
        finally:
            processor.tokenizer = self._tokenizer
        return dict(inputs)

    def _shifts(self, text: str, longer: str, count: int) -> tuple[tuple[int, int, int], ...]:
        """The pieces of a text around its images, and their places in the longer text. Raises OptionError."""
        if text == longer:
            return ((0, len(text), 0),)
        placeholder = next((place for place in self._placeholders if text.count(place) == count), None)
        if placeholder is None:
            raise OptionError(
                f"the chat template does not write one of {', '.join(map(repr, self._placeholders)) or 'no mark'} for "
                f"each of {count} images: use the template of the original model"
            )
        shifts, start, place = [], 0, 0
        for piece in text.split(placeholder):
            is_last = start + len(piece) == len(text)
            place = len(longer) - len(piece) if is_last and longer.endswith(piece) else longer.find(piece, place)
            if place < 0:
                raise OptionError(
                    f"{type(self._processor).__name__} changes the text around images, so the answers in it cannot be "
                    "found: data of this model can only be texts"
                )
            shifts.append((start, start + len(piece), place))
            start, place = start + len(piece) + len(placeholder), place + len(piece)
        return tuple(shifts)


class _Recorder:
    """A tokenizer that keeps the text that it was called with last."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = ""

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        """Tokenize."""
        self.text = text if isinstance(text, str) else text[0]
        return self._tokenizer(text, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
