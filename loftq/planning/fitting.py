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
from loftq.formats.layouts import LAYOUTS, Layout, choose, misfit
from loftq.models import linears, peft_targets
from loftq.models.families import family_of
from loftq.models.linears import DenseLinear
from loftq.models.loader_probe import keeps_modules, unpackable
from loftq.planning.recipe import Recipe

Targets = Mapping[str, DenseLinear]


class Fitting:
    """The linears of a model that are quantized, `targets`, and those that stay in 16 bits, `reasons`, by module.

    `format` is the name of the layout, which is that of the recipe or the first that can hold the linears. Raises
    OptionError if linears with more than half of the weights do not fit, or if no linear is left. With `with_experts`,
    the layout also holds fused experts.
    """

    def __init__(self, model: nn.Module, targets: Targets, recipe: Recipe, *, with_experts: bool = False) -> None:
        self.targets = dict(targets)
        self.reasons: dict[str, str] = {}
        self._weights = sum(prod(dense.shape) for dense in targets.values())
        self._leave_unusable(model)
        self._take_out(lambda module, dense: _rank_problem(module, dense, recipe))
        shapes = {dense.shape for dense in self.targets.values()}
        loadable = _loadable(model, self.targets, recipe)
        if with_experts:
            loadable = [name for name in loadable if LAYOUTS[name].EXPERTS]
        self.format = choose(recipe.grids, recipe.format, shapes=shapes, loadable=loadable)
        self._take_out(lambda module, dense: _format_problem(module, dense, recipe, self.format))

    def _leave_unusable(self, model: nn.Module) -> None:
        """Take out the linears that peft or the code of the model cannot use.

        Raises OptionError if no linear is left.
        """
        kinds = ((peft_targets.refused, "peft refuses them"), (peft_targets.redirected, "peft adapts experts instead"))
        for function, reason in kinds:
            self._drop(dict.fromkeys(function(model, self.targets), reason))
        config = getattr(model, "config", None)  # only models of transformers have code that is not known
        if config is not None and not family_of(str(config.model_type)).tested:
            self._drop(unpackable(model, self.targets))
        if not self.targets:
            raise OptionError(f"no linear is left to quantize: {next(iter(self.reasons.values()))}")

    def _drop(self, reasons: Mapping[str, str]) -> None:
        for module, reason in reasons.items():
            self.reasons[module] = reason
            del self.targets[module]

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
        self._drop({module: reason for module, (_, reason) in problems.items()})


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


def _format_problem(module: str, dense: DenseLinear, recipe: Recipe, format: str) -> tuple[str, str] | None:
    rows, columns = dense.shape
    for grid in recipe.grids:
        problem = misfit(format, grid, rows, columns)
        if problem is not None:
            text = f"{module} ({rows} x {columns}): {problem}, or --exclude-modules {module.rpartition('.')[2]}"
            wanted = f"{grid.sharing} {grid.block(columns)}" if "divide" in problem else f"--format {format}"
            return text, f"they do not fit {wanted}"
    return None


def _loadable(model: nn.Module, targets: Mapping[str, DenseLinear], recipe: Recipe) -> list[str]:
    """The formats whose loaders accept the targets."""
    stock = all(layer.stock for layer in targets.values())
    text = getattr(model, "main_input_name", "") == "input_ids"

    def loads(layout: Layout) -> bool:
        if not keeps_modules(model, layout.METHOD):
            return False
        if not layout.STOCK:
            return True
        if not (stock and layout.WITHOUT_WEIGHT):
            return stock
        return text and all(map(layout.holds, recipe.grids)) and linears.bears_other_linears(model, targets)

    return [name for name, layout in LAYOUTS.items() if loads(layout)]
