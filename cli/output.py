"""What a run of quantizing prints at its end."""

from __future__ import annotations

import json

import click

from loftq.solving.report import Report


def show(report: Report, as_json: bool) -> None:
    """The report on stdout, for a person with the lines that load the result."""
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    click.echo(report.table())
    if report.pushed is not None:
        click.echo(f"\n{report.pushed['lines']}", nl=False)
    elif report.seconds is not None:
        loader = "load_qalora" if report.recipe["adapter"] == "qalora" else "load_qlora"
        click.echo(f"\nLoad it:  model = loftq.{loader}({str(report.folder)!r})")
