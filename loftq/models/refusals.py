"""Turns the errors of transformers and peft about a folder into errors of loftq."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from loftq.display import one_line
from loftq.errors import ArtifactError, LoftQError, SourceError
from loftq.formats.model_config import FILE
from loftq.models.devices import is_full_memory


@contextmanager
def explain_loading(folder: Path, file: str = FILE) -> Iterator[None]:
    """Turn an error of transformers or peft about the values of `file` in a folder into an ArtifactError."""
    try:
        yield
    except LoftQError:
        raise
    except Exception as error:  # the classes of configurations, models and quantizers may raise any exception
        if is_full_memory(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = one_line(error, 300)
        raise ArtifactError(
            f"{folder} cannot be loaded with its {file} ({reason}): copy or download the folder again"
        ) from error


@contextmanager
def explain_forward(name: str, model_type: str) -> Iterator[None]:
    """Turn an error of the code of a model, which is run on text, into a SourceError."""
    try:
        yield
    except LoftQError:
        raise
    except Exception as error:  # the code of a model may raise anything for inputs that it does not expect
        of_the_disk = isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno is not None)
        if is_full_memory(error) or of_the_disk:  # statistics are written between the blocks of a model
            raise
        raise SourceError(
            f"{name} cannot be calibrated: the code of {model_type} in transformers fails on the calibration text "
            f"({one_line(error, 200) or type(error).__name__}): quantize it without --calibration"
        ) from error
