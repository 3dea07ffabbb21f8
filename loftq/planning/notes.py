"""Notes on a plan that a user should know, one line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loftq.core.codebooks import listing
from loftq.display import few_of
from loftq.formats.prequantized import DenseView
from loftq.models import coverage
from loftq.models.families import family_of
from loftq.models.language_part import language_part
from loftq.models.linears import Linears
from loftq.models.naming import NameMap
from loftq.models.tasks import own_task

if TYPE_CHECKING:
    from loftq.planning.plan import Plan


def notes_on(plan: Plan, linears: Linears, names: NameMap) -> Iterator[str]:
    """Notes on the model, on what loads the result, and on what stays unquantized."""
    dtype = plan.recipe.compute_dtype
    if not family_of(plan.model_type).tested and not coverage.rows_of(plan.model_type):
        part = language_part(plan.model, plan.task.name, list(linears.candidates))
        which = "its modules" if part is None else "its language model, unless --target-modules names others,"
        yield f"model type {plan.model_type} is not in the table of families: every linear of {which} is quantized"
    if family_of(plan.model_type).float32:
        yield f"transformers runs {plan.model_type} only in float32, so this is the compute dtype"
    if isinstance(plan.source.checkpoint, DenseView):
        kind = plan.source.checkpoint.title
        yield f"the weights of the source are quantized ({kind}): they are dequantized, and then quantized again"
    if plan.layout.PLAN_NOTE:
        unusual = {type(plan.model.get_submodule(layer.module)).__name__ for layer in plan.linears} - {
            "Linear",
            "Conv1D",
        }
        what = f"{', '.join(sorted(unusual))} quantized" if unusual else listing(plan.codebooks.values())
        yield plan.layout.PLAN_NOTE.format(what=what, loader=f"load_{plan.kind}")
    if plan.recipe.needs_adapter:
        yield (
            "the backbone leaves out what the adapter adds (--rounding projected), so it is of no use without an "
            "adapter that was trained from this start; --rounding intrinsic gives one with all of the weights"
        )
    for what, left in (("", linears.others), (" that share their weight", linears.shared)):
        if left:
            kinds = {type(plan.model.get_submodule(name)).__name__ for name in left}
            yield f"{len(left)} dense layers of class {', '.join(sorted(kinds))}{what} stay in {dtype}"
    if plan.created:
        yield f"not in the checkpoint, newly initialized: {few_of(list(plan.created))}"
    if names.left_out:
        yield f"not a part of the model, left out: {few_of(names.left_out)}{_kept_by(plan, names.left_out)}"


def _kept_by(plan: Plan, left_out: Sequence[str]) -> str:
    """The share of the checkpoint that is left out, and the task that would keep it, unless the task is its own."""
    own = own_task(plan.source.folder)
    if own == plan.task.name:
        return ""
    sizes = {name: spec.numel for name, spec in plan.source.checkpoint.tensors.items()}
    share = sum(sizes[name] for name in left_out) / sum(sizes.values())
    advice = f"; --task {own} keeps them" if own else ""
    return f" ({share:.1%} of the weights{advice})"
