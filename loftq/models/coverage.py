"""What the tests have seen each model type do: the rows of `data/coverage.json`, which `make coverage` writes."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def rows() -> tuple[dict[str, Any], ...]:
    """A row for each type and task, on a small model that is made from the config of the type.

    `type`, `group` and `task` name it. `refused` is the error of a type that cannot be quantized, and the only other
    entry of its row. `loads` is "stock" or "loftq". `nearer` is the distance of the outputs to those of the
    full-precision model, relative to the distance without the adapter. `trains` is the number of factors that get a
    gradient, and of all factors. `calibrates` is "text", "partly" if text does not reach every linear, or "no". `kept`
    is the share of the weights that stays in 16 bits, at the size that the type has by default (null if
    that cannot be built). `targets` are the last
    parts of the names of the quantized linears.
    """
    file = resources.files("loftq.models").joinpath("data", "coverage.json")
    return tuple(json.loads(file.read_text(encoding="utf-8")))


def rows_of(model_type: str) -> list[dict[str, Any]]:
    """The rows of a model type, the usual task first."""
    return [row for row in rows() if row["type"] == model_type]


def types() -> list[str]:
    """The model types of the rows."""
    return list(dict.fromkeys(row["type"] for row in rows()))
