"""One name for one start: the method that an artifact is named after is the one that made its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq.core.solvers.methods import METHODS, PLAIN_START, WITHOUT_TEXT
from loftq.errors import OptionError


def honest_name(method: str, iters: int | None) -> str:
    """Return the name of the start that a method makes with a number of iterations; None is the method's own number.

    Without iterations, LoftQ is QLoRA's start. Raises OptionError for QLoRA with iterations, which would be LoftQ, and
    for QERA without the factorization that it consists of.
    """
    if method == PLAIN_START and iters:
        raise OptionError(
            f"--iter {iters}: with --method {PLAIN_START} the adapter adds nothing, so nothing is iterated: use "
            f"--method {WITHOUT_TEXT} --iter {iters}, or leave --iter out"
        )
    if iters != 0 or not METHODS[method].plain:
        return method
    if METHODS[method].needs_moment:
        raise OptionError(
            f"--iter 0: with --method {method} the adapter would add nothing: use --method {PLAIN_START}, or leave "
            "--iter out"
        )
    return PLAIN_START


def with_honest_name(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as a `loftq.json` holds it, with the right name where an earlier version called LoftQ QLoRA."""
    misnamed = recipe.get("method") == PLAIN_START and recipe.get("iters")
    return {**recipe, "method": WITHOUT_TEXT} if misnamed else dict(recipe)


def title_of(recipe: Mapping[str, Any]) -> str:
    """The title of the start that the recipe of a `loftq.json` made, also of an earlier version."""
    name = str(with_honest_name(recipe).get("method"))
    if recipe["adapter"] == "qalora":
        return "QA-LoRA"
    if name in METHODS and METHODS[name].plain and not recipe["iters"]:
        name = PLAIN_START
    return METHODS[name].title if name in METHODS else name
