"""`loftq methods`."""

from __future__ import annotations

from dataclasses import asdict

import click

from loftq.core.solvers.methods import METHODS
from loftq.display import columns

from .options import Command, as_json
from .output import echo, echo_json

_NEEDS = {False: "the weights", True: "text"}


@click.command(cls=Command)
@as_json
def methods(as_json: bool) -> None:
    """List the methods of `loftq quantize --method`, with what they minimize, need and cost.

    \b
    scales    absmax: the range of a block; search: the part of the range with the least error
    rounding  nearest: each weight alone; feedback: later weights correct the errors of
              earlier ones (GPTQ); intrinsic: feedback that leaves errors to the adapter too
    metric    identity: error of weights; diagonal, full: error of outputs, from the
              variances of the inputs or from all of their second moments
    turns     number of alternations between rounding and adapter
    refine    number of training steps in which the adapter learns the answers of the
              full-precision model (distillation)
    """
    if as_json:
        echo_json({name: {**asdict(row), "calibrated": row.calibrated} for name, row in METHODS.items()})
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
    echo(columns([header, *rows]))
