"""`loftq methods`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from loftq.core.solvers.methods import METHODS

_NEEDS = {False: "the weights", True: "text"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def methods(as_json: bool) -> None:
    """List the methods of `loftq quantize --method`: what each minimizes, needs and costs.

    \b
    scales    absmax: the range of a block; search: the part of it that leaves the least error
    rounding  nearest; feedback: later weights make up for earlier ones (GPTQ);
              intrinsic: feedback into the directions that the adapter will hold, too
    metric    identity: weights; diagonal, full: outputs, by the inputs' variances or their second moment
    turns     alternations of rounding and adapter
    refine    steps of distillation of the adapter against the full-precision model's answers
    """
    if as_json:
        click.echo(json.dumps({name: {**asdict(row), "calibrated": row.calibrated} for name, row in METHODS.items()}))
        return
    header = ("method", "scales", "rounding", "metric", "turns", "refine", "minimizes", "needs", "cost", "source")
    rows = [
        (
            name,
            row.scales,
            row.rounding,
            row.metric,
            str(row.iterations),
            str(row.refine or "-"),
            row.minimizes,
            _NEEDS[row.calibrated],
            row.cost,
            row.source,
        )
        for name, row in METHODS.items()
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
