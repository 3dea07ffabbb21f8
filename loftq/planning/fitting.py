"""Decides which of the selected linears stay in 16 bits, because peft, the rank, the pool or the format excludes them.

A few linears that do not fit must not keep a whole model from being quantized: models of images and sound have small or
odd linears beside the usual ones. Such linears stay in 16 bits, with a note in the plan. If they hold more than half of
the weights, the settings are wrong for the model, and the plan refuses them with a proposal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from math import prod

from torch import nn

from loftq.display import few_of
from loftq.errors import OptionError
from loftq.formats.layouts import misfit
from loftq.models import peft_targets
from loftq.models.linears import DenseLinear
from loftq.planning.recipe import Recipe

Targets = Mapping[str, DenseLinear]


class Fitting:
    """The linears that are left, `targets`, and those that stay in 16 bits, `reasons`, by the name of the module."""

    def __init__(self, targets: Targets) -> None:
        self.targets = dict(targets)
        self.reasons: dict[str, str] = {}
        self._weights = sum(prod(dense.shape) for dense in targets.values())

    def leave_to_peft(self, model: nn.Module) -> None:
        """Take out the linears that peft refuses, or whose adapters it would put on other parameters.

        Raises OptionError if no linear is left.
        """
        kinds = ((peft_targets.refused, "peft refuses them"), (peft_targets.redirected, "peft adapts experts instead"))
        for function, reason in kinds:
            for module in function(model, self.targets):
                self.reasons[module] = reason
                del self.targets[module]
        if not self.targets:
            raise OptionError(f"no linear is left to quantize: {next(iter(self.reasons.values()))}")

    def fit_rank(self, recipe: Recipe) -> None:
        """Take out the linears that are too small for the rank or the pool. Raises OptionError if they are too many."""
        self._take_out(lambda module, dense: _rank_problem(module, dense, recipe))

    def fit_format(self, recipe: Recipe, format: str) -> None:
        """Take out the linears that a format cannot hold. Raises OptionError if they are too many."""

        def problem(module: str, dense: DenseLinear) -> tuple[str, str] | None:
            rows, columns = dense.shape
            for grid in recipe.grids:
                text = misfit(format, grid, rows, columns)
                if text is not None:
                    last = module.rpartition(".")[2]
                    return f"{module} ({rows} x {columns}): {text}, or --exclude-modules {last}", "they do not fit " + (
                        f"{grid.sharing} {grid.block(columns)}" if "divide" in text else f"--format {format}"
                    )
            return None

        self._take_out(problem)

    def notes(self, dtype: str) -> Iterator[str]:
        """One note for each reason, with a few names."""
        names: dict[str, list[str]] = defaultdict(list)
        for module, reason in self.reasons.items():
            names[reason].append(module)
        for reason, modules in names.items():
            yield f"linears that stay in {dtype}, because {reason}: {few_of(modules)}"

    def _take_out(self, problem: Callable[[str, DenseLinear], tuple[str, str] | None]) -> None:
        """Take out the linears with a problem, which is the text of an error and the reason in a note."""
        problems = {m: found for m, dense in self.targets.items() if (found := problem(m, dense)) is not None}
        weights = sum(prod(self.targets[module].shape) for module in problems)
        if problems and 2 * weights > self._weights:
            raise OptionError(next(iter(problems.values()))[0])
        for module, (_, reason) in problems.items():
            self.reasons[module] = reason
            del self.targets[module]


def _rank_problem(module: str, dense: DenseLinear, recipe: Recipe) -> tuple[str, str] | None:
    rows, columns = dense.shape
    last = module.rpartition(".")[2]
    if recipe.pool_size is not None and columns % recipe.pool_size:
        text = (
            f"--pool-size {recipe.pool_size} does not divide the {columns} inputs of {module}: "
            f"use --pool-size {recipe.group_size}, or --exclude-modules {last}"
        )
        return text, f"--pool-size {recipe.pool_size} does not divide their inputs"
    inputs = columns // (recipe.pool_size or 1)
    if recipe.rank > min(rows, inputs):
        pooled = "" if recipe.pool_size is None else f", pooled by {recipe.pool_size}"
        text = (
            f"--rank {recipe.rank} is larger than the smaller side of {module} ({rows} x {inputs}{pooled}): "
            f"use at most {min(rows, inputs)}, or --exclude-modules {last}"
        )
        return text, f"they are smaller than --rank {recipe.rank}"
    return None
