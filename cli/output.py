"""The output of commands: a result as a table for a person, or as JSON.

Everything that commands print goes through `echo`, because names, notes and texts come from files of others.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

import click

from loftq.display import columns, line_width, visible
from loftq.formats.schema import finite, json_text

if TYPE_CHECKING:
    from loftq.solving.report import Report


class Shown(Protocol):
    """A result that has a table and plain values."""

    def table(self) -> str:
        """The figures, for a person."""

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""


class Formatter(click.HelpFormatter):
    """The layout of a help text."""

    def write_heading(self, heading: str) -> None:
        """Write a heading, in bold where a terminal shows that."""
        self.write(styled(f"{'':>{self.current_indent}}{heading}:\n", bold=True))


def styled(text: str, *, err: bool = False, **style: Any) -> str:
    """A text in a colour or in bold, unless it does not go to a terminal, or NO_COLOR is set (no-color.org)."""
    stream = sys.stderr if err else sys.stdout
    shown = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return click.style(text, **style) if shown else text


class Context(click.Context):
    """A context whose help has this layout."""

    formatter_class = Formatter


@contextmanager
def fitting_lines(wide: bool = False, always: bool = False) -> Iterator[None]:
    """Wrap tables at the width of the terminal, or of COLUMNS. What goes elsewhere is wrapped (at 80) if `always`."""
    fits = always or "COLUMNS" in os.environ or sys.stdout.isatty()
    token = line_width.set(shutil.get_terminal_size().columns if fits and not wide else None)
    try:
        yield
    finally:
        line_width.reset(token)


def echo_table(rows: Sequence[Mapping[str, str]], fitting: Sequence[str], wide: bool) -> None:
    """Print a table, from rows by the titles of its columns: all columns if `wide` or if they fit, else `fitting`."""
    titles = list(rows[0])
    with fitting_lines(wide, always=True):
        width = line_width.get()
        longest = [max(len(title), *(len(row[title]) for row in rows)) for title in titles]
        if width is not None and sum(longest) + 2 * (len(titles) - 1) > width:
            titles = list(fitting)
        echo(columns([titles, *([row[title] for title in titles] for row in rows)]), heading=True)


def echo(text: str, *, nl: bool = True, heading: bool = False) -> None:
    """Print lines on stdout, with escapes in place of the characters that a terminal would obey."""
    shown = visible(text, lines=True)
    if heading:
        first, newline, rest = shown.partition("\n")
        shown = styled(first, bold=True) + newline + rest
    click.echo(shown, nl=nl)


def quiet_hub() -> None:
    """Hide the progress bars of the Hub client."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()


def echo_json(value: Any) -> None:
    """Print a value as strict JSON: null stands for a number that is not finite."""
    click.echo(json_text(finite(value)).replace("\x7f", "\\u007f"))


class _VisibleStream:
    """A stream that shows control characters as escapes. What a model writes is not for a terminal to obey."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        return self._stream.write(
            "".join(visible(char, lines=True) if char < " " or "\x7f" <= char < "\xa0" else char for char in text)
        )

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


def model_stream() -> TextIO:
    """The stream for text that a model writes: stdout, where a terminal gets no control characters."""
    return cast(TextIO, _VisibleStream(sys.stdout)) if sys.stdout.isatty() else sys.stdout


def show(result: Shown, as_json: bool) -> None:
    """Print a result."""
    if as_json:
        echo_json(result.to_dict())
    else:
        echo(result.table())


def show_report(report: Report, as_json: bool) -> None:
    """Print the report of a quantization, for a person with the lines that load the result."""
    show(report, as_json)
    if as_json:
        return
    if report.pushed is not None:
        echo(f"\n{report.pushed['lines']}", nl=False)
    elif report.seconds is not None:
        echo(f"\nLoad it:  {report.loading_line}")
