"""The output of commands: a result as a table for a person, or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from loftq.solving.report import Report


class Shown(Protocol):
    """A result that has a table and plain values."""

    def table(self) -> str:
        """The figures, for a person."""

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""


def show(result: Shown, as_json: bool) -> None:
    """Print a result."""
    click.echo(json.dumps(result.to_dict()) if as_json else result.table())


def show_report(report: Report, as_json: bool) -> None:
    """Print the report of a quantization, for a person with the lines that load the result."""
    show(report, as_json)
    if as_json:
        return
    if report.pushed is not None:
        click.echo(f"\n{report.pushed['lines']}", nl=False)
    elif report.seconds is not None:
        loader = "load_qalora" if report.recipe["adapter"] == "qalora" else "load_qlora"
        click.echo(f"\nLoad it:  model = loftq.{loader}({str(report.folder)!r})")
