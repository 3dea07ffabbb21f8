"""Opens the images that data name: files, addresses, or bytes in a column of images."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.display import one_line
from loftq.errors import OptionError

if TYPE_CHECKING:
    from PIL import Image

ImageSource = Mapping[str, Any]  # the `path` or address of an image, or its `bytes`
_ADDRESS = re.compile(r"https?://|data:image/")


def source_of(value: Any) -> ImageSource | None:
    """What data hold of one image, as a path or as bytes; None for a value that is no image."""
    if isinstance(value, str):
        return {"path": value, "bytes": b""} if value else None
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        if isinstance(content, bytes) or (isinstance(path, str) and path):
            return {"path": path or "", "bytes": content or b""}
        return None
    if hasattr(value, "save") and hasattr(value, "convert"):  # an image that `datasets` has decoded
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return {"path": "", "bytes": buffer.getvalue()}
    return None


def open_image(source: ImageSource, folders: Sequence[Path] = ()) -> Image.Image:
    """The image of a source, in RGB. A relative path begins in one of `folders`, those of the files of the data.

    Raises OptionError for a file that does not exist or is no image.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise OptionError("reading images needs the pillow package: pip install 'loftq[vision]'") from error
    path = source.get("path")
    named = "an image in the data" if source.get("bytes") else f"the image {path!s:.200}"
    try:
        opened: Image.Image
        if source.get("bytes"):
            opened = Image.open(io.BytesIO(source["bytes"]))
        elif _ADDRESS.match(str(path)):
            from transformers.image_utils import load_image

            opened = load_image(str(path), timeout=60.0)
        else:
            opened = Image.open(_found(str(path), folders))
        return ImageOps.exif_transpose(opened).convert("RGB")
    except OptionError:
        raise
    except Exception as error:  # each format of images has its own errors
        raise OptionError(f"{named} cannot be read ({one_line(error, 200)}): correct or remove the row") from error


def _found(path: str, folders: Sequence[Path]) -> Path:
    name = Path(path.removeprefix("file://")).expanduser()
    places = [name] if name.is_absolute() else [folder / name for folder in folders]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place.parent) for place in places) or "no folder, since the data are no files"
    raise OptionError(
        f"no such image: {path} (looked in: {looked}): correct the path, which is relative to the file of the data"
    )


def folders_of(files: Sequence[str]) -> tuple[Path, ...]:
    """The folders of the files of data, in which relative paths of images begin."""
    paths = [Path(name).expanduser() for name in files]
    return tuple(dict.fromkeys(path.parent for path in paths if path.is_file()))
