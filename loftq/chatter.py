"""Silences what other libraries log and draw while loftq loads and runs models, and restores it afterwards.

A program that uses loftq chooses itself what it shows: `logging.getLogger("loftq")` has what loftq has to say, and
`quiet=False` shows progress bars.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

_LIBRARIES = ("transformers", "bitsandbytes")


@contextmanager
def silenced(quiet: bool = True) -> Iterator[None]:
    """Hide messages of transformers and bitsandbytes below errors, and with `quiet` transformers' progress bars.

    Their announcements of future changes are hidden too: a program that calls loftq cannot act on them.
    """
    from transformers.utils import logging as transformers  # sets the level of its logger when it is imported

    with silent_loggers(*_LIBRARIES), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        shown = transformers.is_progress_bar_enabled()
        try:
            if quiet:
                transformers.disable_progress_bar()  # type: ignore[no-untyped-call]
            yield
        finally:
            if shown:
                transformers.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def silenced_with_data(quiet: bool = True) -> Iterator[None]:
    """The same for work that also reads rows: with `quiet` the progress bars of datasets are hidden too."""
    if not quiet or find_spec("datasets") is None:
        with silenced(quiet):
            yield
        return
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    try:
        datasets.disable_progress_bars()
        with silenced(quiet):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def silent_loggers(*names: str) -> Iterator[None]:
    """Hide what these loggers and those below them say, except for errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(max(level, logging.ERROR))
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
