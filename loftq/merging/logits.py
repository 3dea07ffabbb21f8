"""Compares the logits of a merged model with those of the adapter on its backbone.

The tokens include those whose embeddings the adapter changes. The rounding of a target is computed, not tolerated, so
that the tolerance can be small: a merge in which the adapter of a single linear is missing is not kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.artifacts.pair import BackboneAndAdapter
from loftq.artifacts.staging import Staging
from loftq.errors import ArtifactError
from loftq.formats.checkpoint import Checkpoint, read_checkpoint
from loftq.merging.target import Target
from loftq.models.expert_stacks import stack_names
from loftq.models.loading import load_base
from loftq.models.packed_experts import PackedExperts
from loftq.models.peft_targets import load_adapter
from loftq.models.refusals import explain_loading

_UNITS = 1024  # unit vectors at once


def checked_difference(target: Target, staging: Staging) -> float | None:
    """The difference of logits. Above the target's tolerance, the output is removed and ArtifactError raised."""
    differences = logit_differences(target, staging.folder)
    if differences is None:
        return None
    difference, error = differences
    if target.tolerance is not None and not error <= target.tolerance:
        discard(staging)
        raise ArtifactError(
            f"the outputs of the merged model differ from those of the adapter on its backbone: the logits differ by "
            f"{error:.2g} of their norm (expected at most {target.tolerance:g}, beside rounding). Nothing was written"
        )
    return difference


def discard(staging: Staging) -> None:
    """Remove everything that was written, also the output folder if nothing else is in it."""
    shutil.rmtree(staging.folder)
    if not any(staging.output.iterdir()):
        staging.output.rmdir()


def logit_differences(target: Target, merged: Path) -> tuple[float, float] | None:
    """The difference of the logits of a few tokens, relative to their norm: as they are, and beside rounding.

    For the second, the weights with their adapter, as they are in the loaded model, are rounded as the target rounds
    them. None if the model does not read tokens.
    """
    pair = target.pair
    base = load_base(pair.backbone.artifact or pair.backbone.folder, dtype=torch.float32)
    if base.main_input_name != "input_ids":
        return None
    adapted = load_adapter(base, pair.adapter.folder).eval()
    tokens = _tokens(pair, base.config)
    before = _logits(adapted, base.config, tokens)
    _round(adapted.base_model.model, target, merged)
    expected = _logits(adapted, base.config, tokens)
    del base, adapted
    with explain_loading(merged):
        model = target.load(merged)
    after = _logits(model.eval(), model.config, tokens)
    return float((after - before).norm() / before.norm()), float((after - expected).norm() / expected.norm())


def _tokens(pair: BackboneAndAdapter, config: Any) -> torch.Tensor:
    """Some tokens: 16 from the whole vocabulary, and 16 of those whose embeddings the adapter changes most."""
    vocabulary = pair.embeddings.vocabulary or config.get_text_config().vocab_size
    tokens = (torch.arange(16) * 37 + 11).remainder(vocabulary)
    name = pair.embeddings.inputs
    if name is not None and name in pair.adapter.saved and name in pair.backbone.checkpoint.tensors:
        new, old = pair.kept(name).float(), pair.backbone.checkpoint.read(name).float()
        changes = torch.full((len(new),), torch.inf)
        rows = min(len(new), len(old))
        changes[:rows] = (new[:rows] - old[:rows]).norm(dim=1)
        tokens = torch.cat([tokens, changes.topk(min(16, len(new))).indices])
    return tokens.unsqueeze(0)


@torch.no_grad()
def _round(model: nn.Module, target: Target, merged: Path) -> None:
    """Round the weights of a loaded model with its adapter as a target rounds them. One linear is dense at a time."""
    for name in target.pair.adapter.saved:
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        module = module.modules_to_save["default"] if hasattr(module, "modules_to_save") else module
        parameter = getattr(module, leaf)
        parameter.data = parameter.data.to(target.kept[name].dtype).to(parameter.dtype)
    if target.rounds:
        written = read_checkpoint(merged)
        stacks = target.pair.backbone.stacks
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in stacks):
            _round_experts(model.get_submodule(owner), owner, partial(_rounded_by, target, written))
        for name in (name for name in target.pair.backbone.grids if name not in stacks):
            layer: Any = model.get_submodule(name)
            layer.forward = partial(_rounded_forward, layer, layer.forward, partial(target.rounded, name, written))


def _rounded_by(target: Target, written: Checkpoint, module: str, weight: torch.Tensor) -> torch.Tensor:
    return target.rounded(module, written, weight.float())


def _round_experts(module: Any, owner: str, rounded: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Put dense weights with the adapter in them in the place of packed experts, and round them."""
    while hasattr(module, "base_layer"):
        module.merge()
        module = module.base_layer
    if isinstance(module, PackedExperts):
        module.to_dense()
    for name in stack_names(module):
        weight = getattr(module, name)
        weight.data = rounded(f"{owner}.{name}", weight.data).to(weight.dtype)


def _rounded_forward(
    layer: Any,
    forward: Callable[..., torch.Tensor],
    rounded: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    bias, base.bias = base.bias, None
    try:
        weight = rounded(_weight(layer, base, forward).float())
    finally:
        base.bias = bias
    return nn.functional.linear(inputs.float(), weight, None if bias is None else bias.float()).to(inputs.dtype)


def _weight(layer: Any, base: Any, forward: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The weight (out, in) of a linear with its adapter, as its own code computes it: what it makes of unit vectors."""
    scales = getattr(base.weight, "SCB", None)
    scales = getattr(getattr(base, "state", None), "SCB", None) if scales is None else scales
    if scales is not None:  # LLM.int8 rounds its inputs, so its weight is read
        weight: torch.Tensor = base.weight.data.float() * (scales.float() / 127).unsqueeze(1)
        return weight if base is layer else weight + layer.get_delta_weight("default").float()
    units = torch.eye(base.in_features, device=next(layer.parameters()).device)
    return torch.cat([forward(part) for part in units.split(_UNITS)]).t()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _logits(model: Any, config: Any, tokens: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": tokens}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(1)
    output = model(**inputs)
    answer: torch.Tensor = next(output[key] for key in ("logits", "start_logits", "last_hidden_state") if key in output)
    return answer.double()
