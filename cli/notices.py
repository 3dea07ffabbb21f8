"""Shows on stderr what loftq logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import click

from loftq.display import visible


class _OnStderr(logging.Handler):
    """Writes each message as a line, with escapes in place of what a terminal would obey."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        click.echo(visible(record.getMessage(), lines=True), err=True)


@contextmanager
def shown_notices(quiet: bool) -> Iterator[None]:
    """Show the messages of the logger `loftq`; if `quiet`, only warnings."""
    logger, handler = logging.getLogger("loftq"), _OnStderr(logging.WARNING if quiet else logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
