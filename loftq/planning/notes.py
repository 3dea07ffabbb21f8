"""What a user should know of a plan, a line each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loftq.display import few_of
from loftq.models.families import family_of
from loftq.models.linears import Linears
from loftq.models.naming import NameMap

if TYPE_CHECKING:
    from loftq.planning.plan import Plan


def notes_on(plan: Plan, found: Linears, names: NameMap) -> Iterator[str]:
    """On the model, on who loads the result, and on what stays as it is."""
    dtype = plan.recipe.compute_dtype
    if not family_of(plan.model_type).tested:
        yield f"model type {plan.model_type} has no row of its own: quantized the generic way, by its modules"
    if family_of(plan.model_type).float32:
        yield f"transformers runs {plan.model_type} in float32 alone: that is its compute dtype here"
    if plan.layout.PLAN_NOTE:
        odd = {type(plan.model.get_submodule(layer.module)).__name__ for layer in plan.layers} - {"Linear", "Conv1D"}
        what = f"{', '.join(sorted(odd))} quantized" if odd else ", ".join(sorted(set(plan.codebooks.values())))
        yield plan.layout.PLAN_NOTE.format(what=what, loader=f"load_{plan.kind}")
    if plan.expert_bytes:
        yield f"fused experts stay in {dtype}: {plan.expert_bytes / 1e9:.3g} GB"
    for what, left in (("", found.others), (" that share their weight", found.shared)):
        if left:
            kinds = {type(plan.model.get_submodule(name)).__name__ for name in left}
            yield f"{len(left)} dense layers of class {', '.join(sorted(kinds))}{what} stay in {dtype}"
    if plan.created:
        yield f"not in the checkpoint, begun anew: {few_of(list(plan.created))}"
    if names.left_out:
        yield f"not part of the model, left out: {few_of(names.left_out)}"
