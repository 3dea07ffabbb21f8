"""The second moments of the inputs of fused experts, which are computed while the experts are solved, one at a time.

A token x counts in the moment of an expert e that it was routed to by the square of its weight w_e(x) there, because
the expert's output, and with it the error, is multiplied by that weight:

    H_e = Σ w_e(x)² x xᵀ / Σ w_e(x)²        over the n_e tokens of the expert.

An expert that few tokens reach leans on the tokens of the whole layer, as if κ of them had reached it too:

    H = (n_e · H_e + κ · H_all) / (n_e + κ),        κ = `PRIOR` · in.

The inputs of the second projection are the outputs of the first one in full precision, which only the expert itself can
compute. So the tokens of H_all there are a part of the layer's tokens, which are sent through the expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from loftq.calibration.routed_tokens import PRIOR, RoutedTokens
from loftq.calibration.statistics import Statistics
from loftq.core.moments import weighted_moment
from loftq.errors import SourceError
from loftq.models.expert_stacks import LAST
from loftq.planning.plan import Layer, Plan
from loftq.planning.weights import ExpertReader

SAMPLE = 2048  # tokens at most that are sent through every expert


def expert_inputs(plan: Plan, layer: Layer, statistics: Statistics | None, device: torch.device) -> ExpertInputs | None:
    """The inputs of the experts of a layer; None if no text reached them. Raises ArtifactError."""
    routed = None if statistics is None else statistics.routed(layer.owner)
    return None if routed is None else ExpertInputs(plan, layer, routed, device)


class ExpertInputs:
    """The inputs of the experts of a layer. `counts` has the number of tokens that each expert got."""

    def __init__(self, plan: Plan, layer: Layer, routed: RoutedTokens, device: torch.device) -> None:
        self._layer, self._routed, self._device = layer, routed, device
        self.counts = routed.counts(layer.experts)
        self._first = _FirstProjection(plan, layer) if layer.module.endswith(f".{LAST}") else None

    def moment(self, expert: int) -> torch.Tensor:
        """The moment (in, in) of an expert, float32. Experts must be asked for in order."""
        through = None if self._first is None else self._first.next(self._device)
        rows, choices = torch.nonzero(self._routed.experts == expert, as_tuple=True)
        prior = PRIOR * self._layer.matrix[1]
        total = prior * (self._all if through is None else weighted_moment(through(self._sample), self._equal))
        weights = self._routed.weights[rows, choices].square()
        if len(rows) and float(weights.sum()) > 0:
            tokens = self._tokens(rows)
            own = weighted_moment(tokens if through is None else through(tokens), weights.to(self._device))
            total, prior = total + len(rows) * own, prior + len(rows)
        return (total / prior).float()

    def _tokens(self, rows: torch.Tensor) -> torch.Tensor:
        return self._routed.tokens[rows].to(self._device, torch.float32)

    @cached_property
    def _all(self) -> torch.Tensor:
        """The moment of all tokens of the layer."""
        tokens = self._routed.tokens
        return weighted_moment(tokens.to(self._device), torch.ones(len(tokens), device=self._device))

    @cached_property
    def _sample(self) -> torch.Tensor:
        """Tokens of the layer at equal distances."""
        count = len(self._routed.tokens)
        return self._tokens(torch.arange(0, count, -(-count // SAMPLE)))

    @property
    def _equal(self) -> torch.Tensor:
        return torch.ones(len(self._sample), device=self._device)


class _FirstProjection:
    """Computes the inputs of the second projection of each expert in turn, in float32."""

    def __init__(self, plan: Plan, layer: Layer) -> None:
        first = next(other for other in plan.stacks if other.owner == layer.owner and other.module != layer.module)
        self._module: Any = plan.model.get_submodule(layer.owner)  # on the meta device: only its functions are used
        self._weights: Iterator[torch.Tensor] = iter(ExpertReader(plan, first))
        self._biases = _bias(plan, first) if self._module.has_bias else None
        self._expert = -1

    def next(self, device: torch.device) -> Any:
        """The function of the next expert, from tokens (n, in) to the inputs (n, width) of its second projection."""
        self._expert += 1
        weight = next(self._weights).to(device)
        bias = None if self._biases is None else self._biases[self._expert].to(device, torch.float32)
        module = self._module

        @torch.no_grad()
        def through(tokens: torch.Tensor) -> torch.Tensor:
            hidden = torch.nn.functional.linear(tokens, weight, bias)
            out: torch.Tensor = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
            return out

        return through


def _bias(plan: Plan, first: Layer) -> torch.Tensor:
    """The biases (experts, out) of the first projection."""
    key = f"{first.module}_bias"
    names = [name for name, spec in plan.passed.items() if spec.name == key]
    if not names:
        raise SourceError(
            f"no tensor of {plan.source.name} is known to provide {key}: quantize this model without --calibration, "
            "or add --exclude-modules experts"
        )
    return plan.source.checkpoint.read(names[0])
