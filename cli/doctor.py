"""`loftq doctor`."""

from __future__ import annotations

import sys

import click

from loftq.verbs.doctor import doctor as run

from .options import Command, as_json, debug
from .output import show


@click.command(cls=Command)
@as_json
@debug
def doctor(as_json: bool) -> None:
    """Check this machine: libraries, devices, bitsandbytes on its CPU, disks, the login to the Hub.

    The exit code is 1 if something is wrong. You can paste the output into a bug report: it holds no token.
    """
    result = run()
    show(result, as_json)
    if not result.healthy:
        sys.exit(1)
