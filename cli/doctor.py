"""`loftq doctor`."""

from __future__ import annotations

import json
import sys

import click

from loftq.verbs.doctor import doctor as run


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def doctor(as_json: bool, debug: bool) -> None:
    """Look at this machine: libraries, devices, bitsandbytes on its CPU, disks, the login to the Hub.

    Exit code 1 if something is wrong. Paste the output into a bug report: no token is in it.
    """
    del debug  # read by main
    found = run()
    click.echo(json.dumps(found.to_dict()) if as_json else found.table())
    if not found.healthy:
        sys.exit(1)
