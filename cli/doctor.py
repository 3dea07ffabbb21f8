"""`loftq doctor`."""

from __future__ import annotations

import sys

import click

from .options import Command, as_json, debug, wide
from .output import fitting_lines, show


@click.command(cls=Command)
@as_json
@wide
@debug
def doctor(as_json: bool, wide: bool) -> None:
    """Check this machine: libraries, devices, bitsandbytes on its CPU, disks, the login to the Hub.

    The exit code is 1 if something is wrong. You can paste the output into a bug report: it holds no token.
    """
    from loftq.verbs.doctor import doctor as run  # torch takes seconds

    result = run()
    with fitting_lines(wide, always=True):
        show(result, as_json)
    if not result.healthy:
        sys.exit(1)
