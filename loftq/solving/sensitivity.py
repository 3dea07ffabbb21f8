"""How much the answers of the full-precision model depend on each of its layers.

If the outputs y of a layer change by δ, the answers change by about ½ E[(g·δ)²] nats, where g is the gradient of the
logarithm of an answer's probability by y, and the answer is drawn from the model's own distribution (the Fisher
information). For errors that have no direction, and that are larger for tokens with larger outputs, this is

    ½ ε² · E[‖g‖² ‖y‖²] / out        with ε² = ‖δ‖² / ‖y‖², the relative squared error of the outputs.

The expectation is that of the product for each token: the few tokens whose activations are huge have next to no
gradient. Models without a vocabulary answer with hidden states, of which a random direction takes the place of a
drawn answer.

Unlike all else that a run measures, this needs the whole model in memory, with what one window leaves for its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from loftq.calibration.block_weights import BlockWeights
from loftq.calibration.observer import VOCABULARY
from loftq.calibration.statistics import Statistics
from loftq.core.kernels.products import fast_products
from loftq.errors import OptionError
from loftq.models.cheap_activations import keeping_less
from loftq.models.head_loss import HiddenStates, chunked
from loftq.models.heap import own_pages
from loftq.models.refusals import explain_forward
from loftq.planning.plan import Plan
from loftq.solving.divergence import token_ids

TOKENS = 8192  # of the calibration text that are used: more change the widths by less than other texts do
LENGTH = 512  # tokens of a window


def measure_sensitivities(
    plan: Plan, statistics: Statistics, device: torch.device, *, trust_remote_code: bool, quiet: bool
) -> dict[str, float]:
    """E[‖g‖² ‖y‖²] / out of each linear of a plan. Where the text never comes, weights are as sensitive as the mean.

    Raises OptionError for a calibration on conversations with images.
    """
    if not statistics.has_answers:
        raise OptionError("--allocation sensitive needs a text, not conversations with images: use --allocation auto")
    windows = _windows(statistics)
    weights = BlockWeights(plan, device, trust_remote_code=trust_remote_code)
    for block in weights.blocks:
        weights.load(block)
    states = HiddenStates(weights.core)
    generator = torch.Generator(device).manual_seed(plan.recipe.seed)
    totals = dict.fromkeys((layer.module for layer in plan.linears), 0.0)
    bar = tqdm(windows, unit="window", disable=quiet, dynamic_ncols=True, desc="sensitivities")
    watched = _watched(plan, weights.model, totals)
    explained = explain_forward(plan.source.name, plan.model_type)
    with bar, fast_products(), own_pages(device), watched, explained, torch.enable_grad():
        for window in bar:
            inputs = {name: ids.to(device) for name, ids in window.items()}
            cast(Any, _drawn(weights.core, states, inputs, plan.task.name, generator)).backward()
    tokens = sum(window["input_ids"].numel() for window in windows)
    reached = sum(layer.weights for layer in plan.linears if totals[layer.module])
    mean = sum(totals.values()) / max(reached, 1)
    return {layer.module: (totals[layer.module] or mean * layer.weights) / tokens for layer in plan.linears}


def _windows(statistics: Statistics) -> list[dict[str, torch.Tensor]]:
    """Token ids of windows (1, length), from the beginning of the calibration text's sample."""
    ids = token_ids(statistics.teacher())
    length = min(LENGTH, statistics.settings["sequence_length"])
    count = min(max(TOKENS // length, 1), len(ids["input_ids"]))
    return [{name: tensor[i : i + 1, :length] for name, tensor in ids.items()} for i in range(count)]


@contextmanager
def _watched(plan: Plan, model: nn.Module, totals: dict[str, float]) -> Iterator[None]:
    """While a model runs forward and backward, add up ‖g‖² ‖y‖² / out of each linear in `totals`."""
    handles = [
        model.get_submodule(layer.module).register_forward_hook(partial(_watch, totals, layer.module))
        for layer in plan.linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(
    totals: dict[str, float], name: str, module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor
) -> torch.Tensor:
    """A hook on the outputs of a linear. The first ones of a model, before which nothing trains, begin the graph."""
    if not output.requires_grad:
        output = output.detach().requires_grad_().clone()  # which code may write into
    bias = cast(torch.Tensor | None, getattr(module, "bias", None))
    products = output.detach() if bias is None else output.detach() - bias
    sizes, width = products.float().square().sum(-1), output.shape[-1]  # sizes of tokens

    def add(gradient: torch.Tensor) -> None:  # must not hold the output, by which it is held
        squares = gradient.float().square().sum(-1)
        totals[name] += float((squares * sizes).sum(dtype=torch.float64)) / width

    cast(Any, output).register_hook(add)
    return output


def _drawn(
    core: nn.Module, states: HiddenStates, inputs: dict[str, torch.Tensor], task: str, generator: torch.Generator
) -> torch.Tensor:
    """Minus the sum of the log-probabilities of answers that are drawn, or a random direction of the hidden states."""

    def run() -> Any:
        with keeping_less(generator.device, products=True):
            return core(**inputs)

    if task not in VOCABULARY:
        hidden = run()[0].float()
        direction = torch.randn(hidden.shape, generator=generator, device=hidden.device)
        return cast(torch.Tensor, (hidden * direction).sum())

    def loss(logits: torch.Tensor, _rows: slice) -> torch.Tensor:
        logits = logits.float()
        answers = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        return nn.functional.cross_entropy(logits, answers[:, 0], reduction="sum")

    output = states.of(run)
    if output is None:
        return loss(run().logits.flatten(0, -2), slice(None))
    return chunked(output.logits.flatten(0, -2), cast(nn.Module, states.head), loss)
