"""Parameter types that click does not have, and options that several commands share."""

from __future__ import annotations

import json
from typing import Any

import click


def names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names with commas or blanks between, as a tuple; a default is one already."""
    return value if isinstance(value, tuple) else tuple(value.replace(",", " ").split())


def assignment(value: str | tuple[str, str]) -> tuple[str, str]:
    """NAME=VALUE, in two."""
    if isinstance(value, tuple):
        return value
    name, equals, rest = value.partition("=")
    if not equals or not name or not rest:
        raise ValueError
    return name.strip(), rest.strip()


def setting(value: str | tuple[str, Any]) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON where it is that, a text otherwise."""
    name, text = assignment(value)
    try:
        return name, json.loads(text)
    except (ValueError, TypeError):
        return name, text


data = click.option(
    "--data",
    multiple=True,
    help="Files (.txt, .jsonl, .csv, .tsv, .parquet), or OWNER/NAME[:CONFIG][@SPLIT] of the Hub.",
)
column = click.option(
    "--column",
    "columns",
    type=assignment,
    multiple=True,
    metavar="ROLE=NAME",
    help="A column that has another name than usual.",
)
dtype = click.option(
    "--dtype", help="bfloat16, float16 or float32.  [default: bfloat16 where the device computes in it]"
)
cpu = click.option("--cpu", is_flag=True, default=None, help="Though there is a GPU.")
