"""Adopts a folder of the original LoftQ script: its weights become the codes that they stand for, its factors stay.

The scaling of the adapter is compared with the one that its factors were computed for. If the original weights W are
given, that is the one of 1 and alpha/r with the smaller ‖W − Q − s·B·A‖. If they are not, the largest singular value of
B·A tells it: the residual of rounding is like noise with the standard deviation d, whose largest singular value is
d·(√out + √in), and d is known from the scales. Further alternations make the singular values up to twice as large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from loftq.artifacts.rows import layer_row
from loftq.artifacts.staging import Staging
from loftq.core.error import squared_error
from loftq.core.metric import squared
from loftq.core.packing import single
from loftq.core.recovered import recover, rounding_error
from loftq.core.scales import Solved
from loftq.core.solvers.solution import Trace
from loftq.errors import SourceError
from loftq.formats import adapter
from loftq.formats.shard_writer import ShardWriter
from loftq.hub.source import Source
from loftq.planning.old_start import BLOCK, CODEBOOK, OldStart
from loftq.planning.plan import Layer, Plan
from loftq.planning.weights import digest_of

ADOPTED = (
    "adopted from the original LoftQ script: codes and adapter are those of the source, and errors are distances from "
    "its weights, which lie on NF4 already, not from those of the full-precision model"
)
_GROWTH = math.sqrt(2)  # by which alternations make singular values larger, from 1 to 2: the middle
_TELLS = 1.5  # scalings that differ less cannot be told apart without the original weights


class Adopter:
    """Brings one layer after the other into the output. `original` is the model W, if it is given."""

    def __init__(self, plan: Plan, old: OldStart, original: Source | None) -> None:
        self._plan, self._old, self._original = plan, old, original

    def __call__(self, layer: Layer, writer: ShardWriter) -> dict[str, Any]:
        """Write the codes and the factors of a layer. Raises SourceError if its weights do not lie on NF4."""
        plan, recipe = self._plan, self._plan.recipe
        stored, solved = self._read(layer)
        packed = plan.layout.tensors(layer.module, layer.shape, plan.grid(layer), recipe.dtype, *solved)
        a, b = self._old.adapter.factors(layer.module)
        factors = dict(zip(adapter.keys(layer.module), (a, b), strict=True))
        written = {name: writer.write(name, tensor) for name, tensor in {**packed, **factors}.items()}
        weight = stored.float()
        error = squared_error(weight, weight, (a, b), recipe.scaling) ** 0.5
        trace = Trace(squared(weight) ** 0.5, 0.0, (error,), 1)
        return {
            "sha256": digest_of(stored),
            "row": layer_row(plan, layer, trace),
            "written": written,
            "scalings": self._scalings(layer, weight, solved, (a, b)),
        }

    def check_first(self) -> None:
        """Raise SourceError before anything is written if the folder cannot be adopted, by its first layer."""
        if torch.float32 != self._plan.layout.SCALE_DTYPE:
            raise SourceError(
                f"{self._old.source.name} cannot be adopted: the format {self._plan.format}, which its linears need, "
                "has 16-bit scales, which would change the weights: quantize the original model instead"
            )
        self._read(self._plan.layers[0])

    def _read(self, layer: Layer) -> tuple[torch.Tensor, Solved]:
        """A weight as it is stored, and its codes and scales."""
        stored = self._old.source.checkpoint.read(layer.tensor)
        solved = None if layer.transposed or layer.experts else recover(stored, CODEBOOK, BLOCK)
        if solved is None:
            raise SourceError(
                f"{self._old.source.name} has an adapter in {adapter.FOLDER}, but {layer.tensor} does not lie on "
                f"{CODEBOOK.upper()} in blocks of {BLOCK}, as a folder of the original LoftQ script would: move "
                f"{adapter.FOLDER} away to quantize the weights as they are"
            )
        return stored, solved

    def _scalings(self, layer: Layer, weight: torch.Tensor, solved: Solved, factors: Any) -> dict[str, float]:
        """What tells for which scaling the factors of a layer were computed."""
        if self._original is None:
            codes, scales = solved
            noise = rounding_error(single(codes, 4), scales.values, CODEBOOK, BLOCK)
            largest = float((factors[0].norm(dim=1) * factors[1].norm(dim=0)).max())
            expected = noise * sum(math.sqrt(side) for side in layer.shape) * _GROWTH
            return {"guess": expected / largest} if largest and expected else {}
        spec = self._original.checkpoint.tensors.get(layer.tensor)
        if spec is None or spec.shape != tuple(layer.shape):
            found = "is missing" if spec is None else f"has shape {spec.shape}"
            raise SourceError(
                f"--source {self._original.name}: {layer.tensor} {found}: it is not the model that "
                f"{self._old.source.name} was made from"
            )
        original = self._original.checkpoint.read(layer.tensor).float()
        return {
            "weight": squared(original),
            "plain": squared_error(original, weight, None),
            "own": squared_error(original, weight, factors, self._plan.recipe.scaling),
            "one": squared_error(original, weight, factors, 1.0),
        }


def adoption_notes(plan: Plan, staging: Staging) -> list[str]:
    """What a user must know of an adopted folder: what its errors mean, and whether the scaling fits the factors."""
    notes = [ADOPTED]
    records = [staging.done[layer.tensor].get("scalings", {}) for layer in plan.layers]
    own = plan.recipe.scaling
    if all("own" in record for record in records):
        notes.append(_measured_note(own, records, plan.recipe.rank))
    elif max(own, 1 / own) > _TELLS and any(records):
        guess = median(record["guess"] for record in records if record)
        fits = abs(math.log(guess / own)) < abs(math.log(guess))
        how = "by the size of the factors; --source MODEL measures it"
        notes.append(_fits(own, how) if fits else f"{_forgotten(own)} ({how}): {_advice(plan.recipe.rank)}")
    return notes


def _measured_note(own: float, records: list[Mapping[str, float]], rank: int) -> str:
    weight, plain, with_own, with_one = (
        math.sqrt(sum(record[key] for record in records)) for key in ("weight", "plain", "own", "one")
    )
    errors = f"error of the weights {plain / weight:.5f} without the adapter, {with_own / weight:.5f} with it"
    if with_own <= with_one * 1.001:
        return _fits(own, errors)
    return f"{_forgotten(own)} ({errors}, {with_one / weight:.5f} with a scaling of 1): {_advice(rank)}"


def _fits(own: float, how: str) -> str:
    return f"the scaling of the adapter, {own:g}, is the one that its factors were computed for ({how})"


def _forgotten(own: float) -> str:
    return f"the scaling of the adapter is {own:g}, but its factors were computed for 1"


def _advice(rank: int) -> str:
    return f"add --alpha {rank} and --overwrite to correct it"
