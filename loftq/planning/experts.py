"""Decides which fused experts are quantized, and in which tensors of the checkpoint each of their experts is found.

An expert is read alone, never together with the others of its layer. A checkpoint holds either one tensor of all
experts, of which a part is read, or tensors for each expert, which transformers' own conversion turns into the expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from loftq.errors import OptionError
from loftq.formats.adapter_targets import target_parameters
from loftq.formats.checkpoint import Checkpoint
from loftq.formats.layouts import OURS, misfit
from loftq.models.expert_stacks import ExpertStack, find_stacks
from loftq.models.linears import reached_stacks
from loftq.models.naming import NameMap, fuse
from loftq.planning.plan import Layer, Plan
from loftq.planning.recipe import Recipe, option_without_experts
from loftq.planning.weights import check_quantizable

Parts = tuple[tuple[tuple[str, str], ...], ...]


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint holds the experts of a parameter: the name of a tensor, or else the parts of each expert."""

    tensor: str
    parts: Parts = ()


class Experts:
    """The fused experts of a model: `layers` are quantized, and the others stay in 16 bits, for the `reasons`.

    The parameters of a module are quantized together or not at all. Raises OptionError if experts that hold most of the
    weights do not fit the settings.
    """

    def __init__(self, model: nn.Module, names: NameMap, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self._model, self._names, self._checkpoint, self._recipe = model, names, checkpoint, recipe
        found = find_stacks(model)
        self._count = len(found.candidates)
        self.reasons = dict(found.others)
        chosen = self._selected(found.candidates)
        layers = [self._layer(name, stack) for name, stack in chosen.items()]
        left = {layer.module.rpartition(".")[0] for layer in layers if layer.module in self.reasons}
        for layer in layers:
            if layer.module.rpartition(".")[0] in left:
                self.reasons.setdefault(layer.module, "the other parameter of their module stays so")
        self.layers = tuple(layer for layer in layers if layer.module not in self.reasons)

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """The names with which peft finds these parameters."""
        everything = [name for name, _ in self._model.named_parameters()]
        return tuple(target_parameters([layer.module for layer in self.layers], everything))

    def notes(self, plan: Plan) -> Iterator[str]:
        """The fused experts that stay in 16 bits, by reason."""
        dtype = plan.recipe.compute_dtype
        sizes = {name: parameter.numel() for name, parameter in self._model.named_parameters()}
        for reason in dict.fromkeys(self.reasons.values()):
            kept = sum(sizes[name] for name, other in self.reasons.items() if other == reason)
            yield f"fused experts stay in {dtype}: {kept * plan.recipe.dtype.itemsize / 1e9:.3g} GB, because {reason}"

    def _selected(self, candidates: Mapping[str, ExpertStack]) -> dict[str, ExpertStack]:
        """The candidates that the settings select."""
        recipe = self._recipe
        if recipe.expert_bits is None:
            other = option_without_experts(recipe)
            reason = "only their full-precision weights are used" if other is None else f"{other} has no place for them"
            self.reasons |= dict.fromkeys(candidates, reason)
            return {}
        wanted = reached_stacks(candidates, recipe.target_modules) if recipe.target_modules else list(candidates)
        left = set(reached_stacks(candidates, recipe.exclude_modules))
        self.reasons |= {name: "they are excluded" for name in candidates if name in left or name not in wanted}
        chosen = {name: stack for name, stack in candidates.items() if name not in self.reasons}
        if chosen and recipe.dropout:
            raise OptionError(
                f"--dropout {recipe.dropout}: peft has no dropout for fused experts: leave it out, or add "
                "--exclude-modules experts"
            )
        return chosen

    def _layer(self, name: str, stack: ExpertStack) -> Layer:
        """The layer of a parameter; the reason why it cannot be quantized is noted."""
        recipe = self._recipe
        problem = _problem(name, stack, recipe)
        if problem is not None:
            if 2 * prod(stack.shape) * self._count > self._everything():
                raise OptionError(problem[0])
            self.reasons[name] = problem[1]
        place = self._place(name, stack)
        if place is None:
            self.reasons[name] = "the checkpoint does not hold them expert by expert"
            place = _Place(name)
        bits, rank = recipe.expert_bits or 0, int(recipe.expert_rank or 0)
        return Layer(name, place.tensor, stack.shape, stack.transposed, bits, rank, place.parts)

    def _everything(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    def _place(self, name: str, stack: ExpertStack) -> _Place | None:
        """Where the checkpoint holds the experts of a parameter; None if they cannot be read one by one."""
        tensors = self._checkpoint.tensors
        if name in self._names.source:
            check_quantizable(tensors[self._names.source[name]])
            return _Place(self._names.source[name])
        parts = self._names.fused.get(name, ())
        for part, _ in parts:
            check_quantizable(tensors[part])
        grouped = _by_expert(parts, stack.shape[0])
        if grouped is None:
            return None
        rows, columns = stack.shape[1:]
        expected = (1, columns, rows) if stack.transposed else (1, rows, columns)
        meta = [(part, pattern, torch.empty(tensors[part].shape, device="meta")) for part, pattern in grouped[0]]
        try:
            made = fuse(self._model, name, meta)
        except (RuntimeError, ValueError, IndexError):  # the conversion needs all experts at once
            return None
        return _Place(name, grouped) if list(made) == [name] and tuple(made[name].shape) == expected else None


def _problem(name: str, stack: ExpertStack, recipe: Recipe) -> tuple[str, str] | None:
    """Why experts do not fit the settings, as an error and as the reason in a note; None if they do."""
    _, rows, columns = stack.shape
    rank = int(recipe.expert_rank or 0)
    if rank > min(rows, columns):
        text = (
            f"--expert-rank {rank} is larger than the smaller side of {name} ({rows} x {columns}): "
            f"use at most {min(rows, columns)}"
        )
        return text, f"they are smaller than --expert-rank {rank}"
    grid = recipe.grid(recipe.expert_bits or 0)
    problem = misfit(OURS, grid, rows, columns)
    if problem is None:
        return None
    text = f"{name} ({rows} x {columns}): {problem}, or --exclude-modules {name.split('.')[-2]}"
    return text, f"they do not fit {grid.sharing} {grid.block(columns)}"


def _by_expert(parts: Sequence[tuple[str, str]], experts: int) -> Parts | None:
    """The parts of each expert; None unless every pattern has one part for each expert."""
    by_pattern: dict[str, list[tuple[str, str]]] = {}
    for part in parts:
        by_pattern.setdefault(part[1], []).append(part)
    if not by_pattern or any(len(found) != experts for found in by_pattern.values()):
        return None
    return tuple(zip(*by_pattern.values(), strict=True))
