"""`loftq methods`."""

from __future__ import annotations

from dataclasses import asdict

import click

from loftq.core.solvers.methods import METHODS

from .options import Command, as_json, wide
from .output import echo_json, echo_table

_NEEDS = {False: "the weights", True: "text"}
_FITTING = ("method", "minimizes", "needs", "cost", "source")  # the columns that fit a terminal of 80


@click.command(cls=Command)
@wide
@as_json
def methods(wide: bool, as_json: bool) -> None:
    """List the methods of `loftq quantize --method`, with what they minimize, need and cost.

    \b
    scales    absmax: the range of a block; search: the part of the range with the least error
    rounding  nearest: each weight alone; feedback: later weights correct the errors of
              earlier ones (GPTQ); intrinsic: feedback that leaves errors to the adapter too;
              projected: intrinsic, and the backbone leaves out what the adapter adds anyway
    metric    identity: error of weights; diagonal, full: error of outputs, from the
              variances of the inputs or from all of their second moments
    turns     number of alternations between rounding and adapter
    refine    number of training steps in which the adapter learns the answers of the
              full-precision model (distillation)
    """
    if as_json:
        echo_json({name: {**asdict(row), "calibrated": row.calibrated} for name, row in METHODS.items()})
        return
    rows = [
        {
            "method": name,
            "scales": row.scales,
            "rounding": row.rounding,
            "metric": row.metric,
            "turns": str(row.iterations),
            "refine": str(row.refine or "-"),
            "minimizes": row.minimizes,
            "needs": _NEEDS[row.calibrated],
            "cost": row.cost,
            "source": row.source,
        }
        for name, row in METHODS.items()
    ]
    echo_table(rows, _FITTING, wide)
