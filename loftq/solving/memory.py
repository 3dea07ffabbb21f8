"""Estimates of the peak memory of each part of a run, in bytes beside the program itself. No weight is read for them.

Calibrating needs memory for the weights outside the blocks, one block with the moments of its inputs, an activation for
each token, and the answers, whose logits are computed a batch at a time. Sensitivities of layers need the whole model.
Solving needs memory for one layer for each worker. Refining needs memory for the whole quantized model, its adapter
with gradients and Adam's moments, the answers, and the tensors that autograd keeps for a step.
"""

from __future__ import annotations

import copy
import warnings
from math import prod
from typing import Any, cast

import torch

from loftq.calibration.block_weights import computing_dtype
from loftq.calibration.gather import BATCH_TOKENS
from loftq.calibration.observer import VOCABULARY
from loftq.calibration.sizes import answers_bytes, routed_bytes, vocabulary_of
from loftq.calibration.windows import check_calibratable
from loftq.models.lockstep import find_blocks
from loftq.models.positions import longest_input
from loftq.models.training_memory import embedding_width, kept_bytes, streams_logits, trained_bytes
from loftq.planning.plan import Layer, Plan, adapted_names
from loftq.planning.settings import SENSITIVE
from loftq.solving.sensitivity import LENGTH

_SOLVER_BYTES = 13  # per weight of a layer: float32 twice, its source, its codes, their packed form, a sketch
_CALIBRATED_BYTES = 36  # the same with statistics of inputs: also its residual, errors of columns, factors
_MOMENT_BYTES = 44  # per entry of the second moment: float32 once, float64 five times
_SUM_BYTES = 4  # per entry of a moment while it is summed: only half of the entries are kept, in float64
_FLOAT32 = 4
_DIVERGENCE_BYTES = 8  # per logit, more than a loss on labels needs: two float32 gradients exist at once


def needed(plan: Plan, workers: int, device: torch.device) -> dict[str, int]:
    """Bytes that each part of a run needs at its peak, in the order of the parts.

    Refining is left out for a model that cannot be run without its weights. Raises OptionError and SourceError if the
    model cannot be calibrated.
    """
    if plan.recipe.calibration is None:
        return {"solving": _solving(plan, workers)}
    check_calibratable(plan, _tokens(plan))
    dtype = computing_dtype(plan, device)
    parts = {"calibrating": calibrating_bytes(plan, dtype)}
    if plan.recipe.allocation == SENSITIVE:
        parts["measuring"] = _sensitivities(plan, dtype)
    parts["solving"] = _solving(plan, workers)
    refining = _refining(plan, dtype, device) if plan.recipe.refine else None
    return parts if refining is None else {**parts, "refining": refining}


def _solving(plan: Plan, workers: int) -> int:
    largest = max(solving_bytes(plan, layer) for layer in plan.layers)
    tensors = plan.source.checkpoint.tensors
    copied = max((2 * tensors[name].nbytes for name in plan.passed), default=0)
    return workers * max(largest, copied)


def solving_bytes(plan: Plan, layer: Layer) -> int:
    """Bytes that a worker needs to solve a layer."""
    rows, columns = layer.matrix
    one = rows * columns  # the weights that are solved together
    calibrated = plan.recipe.calibration is not None
    needed = one * _CALIBRATED_BYTES + columns**2 * _MOMENT_BYTES if calibrated else one * _SOLVER_BYTES
    if layer.experts:  # one at a time, with the factors of all, and the tokens of the layer
        needed += 2 * layer.experts * layer.rank * (rows + columns) * _FLOAT32
        needed += routed_bytes(plan, layer, _tokens(plan)) if calibrated else 0
    return needed


def calibrating_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Bytes that a process needs to run a plan's model in a dtype over all tokens of the calibration."""
    model: Any = plan.model
    blocks = find_blocks(model, [layer.module for layer in plan.linears])
    sizes = {name: _parameters(model.get_submodule(name)) * dtype.itemsize for name in blocks}
    outside = _parameters(model) * dtype.itemsize - sum(sizes.values())
    for layer in plan.linears:
        block = next((name for name in blocks if layer.module.startswith(f"{name}.")), None)
        if block is not None:
            sizes[block] += layer.matrix[1] ** 2 * _SUM_BYTES
    for owner, layer in {layer.owner: layer for layer in plan.stacks}.items():
        block = next((name for name in blocks if owner.startswith(f"{name}.")), None)
        if block is not None:
            sizes[block] += 2 * routed_bytes(plan, layer, _tokens(plan))  # the batches, and all of them joined
    activations = _tokens(plan) * embedding_width(model) * dtype.itemsize
    logits = BATCH_TOKENS * vocabulary_of(plan) * (dtype.itemsize + 4) if plan.task.name in VOCABULARY else 0
    return outside + activations + max(max(sizes.values(), default=0), logits) + answers_bytes(plan, _tokens(plan))


def _sensitivities(plan: Plan, dtype: torch.dtype) -> int:
    """The whole model, and what a window leaves for its gradient: half as much again as linears' inputs and outputs."""
    tokens = min(LENGTH, cast(int, plan.recipe.sequence_length))
    kept = tokens * 3 * sum(sum(layer.matrix) for layer in plan.linears) // 2
    return (_parameters(cast(Any, plan.model)) + kept) * dtype.itemsize


def kept_inputs_bytes(plan: Plan, device: torch.device) -> int:
    """Bytes of the inputs of one block's linears for all tokens, each of which modules of the same owner share."""
    blocks = find_blocks(cast(Any, plan.model), [layer.module for layer in plan.linears])
    widths: dict[str, dict[tuple[str, int], int]] = {name: {} for name in blocks}
    for layer in plan.linears:
        block = next((name for name in blocks if layer.module.startswith(f"{name}.")), None)
        if block is not None:
            widths[block][layer.owner, layer.matrix[1]] = layer.matrix[1]
    largest = max((sum(found.values()) for found in widths.values()), default=0)
    return largest * _tokens(plan) * computing_dtype(plan, device).itemsize


def _refining(plan: Plan, dtype: torch.dtype, device: torch.device) -> int | None:
    from peft import LoraConfig  # importing it takes seconds

    from loftq.models.packed_experts import pack_stacks
    from loftq.models.peft_targets import adapt
    from loftq.solving.refine import LARGE, windows_a_step

    length = min(cast(int, plan.recipe.sequence_length), longest_input(plan.model), _tokens(plan))
    with torch.device("meta"):
        model = copy.deepcopy(cast(Any, plan.model)).to(dtype)
        with warnings.catch_warnings(action="ignore"):  # a warning about GPT-2's transposed weights
            pack_stacks(model, {layer.module: (plan.grid(layer), layer.shape) for layer in plan.stacks}, "meta")
            model = adapt(model, LoraConfig(r=plan.recipe.rank, **adapted_names(plan)))
    batch = windows_a_step(length), length
    try:
        checkpointing = plan.weights > LARGE
        kept = kept_bytes(model, batch, (plan.task.name,), device, checkpointing=checkpointing, products=True)
    except (RuntimeError, ValueError):  # its code depends on values, which meta tensors do not have
        return None
    whole = plan.task.name in VOCABULARY and not streams_logits(model, (plan.task.name,))
    logits = batch[0] * batch[1] * vocabulary_of(plan) if whole else 0
    unquantized = sum(spec.nbytes // spec.dtype.itemsize for spec in plan.passed.values()) * dtype.itemsize
    quantized = int(plan.layer_bits * plan.weights / 8)
    largest = max(prod(layer.matrix) for layer in plan.layers) * dtype.itemsize
    trained = trained_bytes(plan.trained_parameters)
    answers = answers_bytes(plan, _tokens(plan))
    return quantized + unquantized + largest + trained + kept + logits * _DIVERGENCE_BYTES + answers


def _tokens(plan: Plan) -> int:
    return cast(int, plan.recipe.calibration_tokens)


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
