"""`quantize_model`: LoftQ on any module in memory, with no checkpoint and no transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from loftq.chatter import silenced
from loftq.core import allocation as budgets
from loftq.core.grid import Grid
from loftq.core.solvers.solution import Solution, check_solution, unsolvable
from loftq.display import one_line
from loftq.errors import OptionError
from loftq.formats.layouts import LAYOUTS, choose, misfit
from loftq.models.layout_linears import linears_of, quantized_classes, replace_module
from loftq.models.linears import DenseLinear, Linears, select
from loftq.models.loading import guard_cpu
from loftq.models.peft_targets import adapt
from loftq.planning.recipe import Recipe, layer_seed, recipe_of
from loftq.planning.synonyms import IN_MEMORY, also_named
from loftq.solving.layers import solve_by


@also_named(IN_MEMORY)
@silenced()
def quantize_model(
    model: nn.Module,
    target_modules: Sequence[str] | None = None,
    *,
    exclude_modules: Sequence[str] = (),
    bits: float = 4,
    allocation: str | None = None,
    rank: int = 16,
    iters: int = 5,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    quant_type: str | None = None,
    block_size: int | None = None,
    group_size: int | None = None,
    zero_point: str | None = None,
    double_quant: bool = False,
    compute_dtype: torch.dtype | None = None,
    svd: str = "krylov",
    seed: int = 0,
    lora: bool = True,
    quantize: bool = True,
) -> nn.Module:
    """Quantize the linears of `model` in place and give them LoRA adapters that repair the error.

    `target_modules` are names or patterns; the default is every `nn.Linear`. A weight becomes bitsandbytes'
    `Linear4bit` or `Linear8bitLt` if these hold its type, and our `PackedLinear` otherwise. Biases stay. The adapters
    are peft's: the function returns a `PeftModel` around `model`. Types and budgets are those of `loftq.quantize`.
    With `quantize=False` the weights stay as they are and the adapters start as plain LoRA (B = 0). With `lora=False`
    the function only quantizes, and returns `model` itself. A linear that is quantized already is not quantized again;
    it gets a plain LoRA. `compute_dtype` is by default the dtype of each weight. The keywords `module`, `mlp_layers`,
    `r`, `require_lora` and `use_qlora` mean `model`, `target_modules`, `rank`, `lora` and `quantize`. Raises
    OptionError.
    """
    if not lora and not quantize:
        raise OptionError("lora=False and quantize=False leave nothing to do")
    recipe = recipe_of(
        bits=bits,
        allocation=allocation,
        rank=rank,
        iters=iters,
        alpha=alpha,
        rslora=rslora,
        dropout=dropout,
        quant_type=quant_type,
        block_size=block_size,
        group_size=group_size,
        zero_point=zero_point,
        double_quant=double_quant,
        svd=svd,
        seed=seed,
    )
    targets = _find_targets(model, target_modules, exclude_modules)
    format = choose(recipe.grids, None, loadable=[name for name, layout in LAYOUTS.items() if layout.IN_MEMORY])
    for name, module in targets.items():
        _check_fits(name, module, recipe, format, quantize=quantize, lora=lora)
    dense = {name: module for name, module in targets.items() if quantize and type(module) is nn.Linear}
    solutions = _replace_all(model, dense, recipe, format, rank if lora else 0, compute_dtype)
    guard_cpu(model)
    return _attach(model, list(targets), recipe, solutions) if lora else model


def _replace_all(
    model: nn.Module,
    targets: dict[str, nn.Linear],
    recipe: Recipe,
    format: str,
    rank: int,
    compute_dtype: torch.dtype | None,
) -> dict[str, Solution]:
    """Put a quantized linear in the place of each target. Returns the solution of each."""
    solutions: dict[str, Solution] = {}
    for (name, module), width in zip(targets.items(), _widths(targets, recipe, format, rank), strict=True):
        grid = recipe.grid(width)
        solutions[name] = _solve(name, module, recipe, grid, format, rank)
        replace_module(model, module, linears_of(format).build(module, grid, solutions[name], compute_dtype))
    return solutions


def _find_targets(model: nn.Module, wanted: Sequence[str] | None, excluded: Sequence[str]) -> dict[str, nn.Linear]:
    quantized = quantized_classes()
    candidates: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, quantized)
    }
    if not candidates:
        raise OptionError(f"{type(model).__name__} holds no nn.Linear: there is nothing to quantize")
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise OptionError("the model has LoRA adapters already: merge or unload them first")
    shapes = {name: DenseLinear((module.out_features, module.in_features)) for name, module in candidates.items()}
    return {name: candidates[name] for name in select(model, Linears(shapes), wanted, excluded)}


def _widths(targets: dict[str, nn.Linear], recipe: Recipe, format: str, rank: int) -> list[float]:
    """The bits of each target."""
    weights = [module.weight.numel() for module in targets.values()]
    widths = recipe.widths
    if len(widths) == 1 or not targets:
        return [widths[0]] * len(targets)
    if recipe.allocation == "first":
        return budgets.first(weights, widths[0], widths[-1], recipe.bits)
    once = replace(recipe, iters=min(recipe.iters, 1))
    errors = {
        width: [
            _solve(name, module, once, recipe.grid(width), format, rank).trace.final ** 2
            for name, module in targets.items()
        ]
        for width in widths
    }
    return budgets.least_error(weights, errors, recipe.bits)


def _check_fits(name: str, module: nn.Linear, recipe: Recipe, format: str, *, quantize: bool, lora: bool) -> None:
    rows, columns = module.out_features, module.in_features
    if lora and recipe.rank > min(rows, columns):
        raise OptionError(f"rank {recipe.rank} is larger than the smaller side of {name!r} ({rows} x {columns})")
    if quantize and type(module) is nn.Linear:
        problem = misfit(format, recipe.grids[0], rows, columns)
        if problem is not None:
            raise OptionError(f"{name!r} ({rows} x {columns}): {problem}, or leave it out with exclude_modules")
        if not bool(torch.isfinite(module.weight).all()):
            raise OptionError(f"the weight of {name!r} holds NaN or Inf: leave it out with exclude_modules")


def _solve(name: str, module: nn.Linear, recipe: Recipe, grid: Grid, format: str, rank: int) -> Solution:
    quantizer = grid.decoder(module.in_features, LAYOUTS[format].SCALE_DTYPE)
    weight = module.weight.detach().float().contiguous()
    seed = layer_seed(recipe.seed, name)
    try:
        solution = solve_by(recipe, weight, None, quantizer, recipe.iters, seed, rank)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise unsolvable(name, one_line(error)) from error
    check_solution(solution, quantizer, name)
    return solution


def _attach(model: nn.Module, names: list[str], recipe: Recipe, solutions: dict[str, Solution]) -> nn.Module:
    from peft import LoraConfig

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        target_modules=names,
    )
    plain = {name: model.get_submodule(name) for name in names}
    aliases: dict[int, list[str]] = {}
    for alias, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(alias)
    adapted = cast(nn.Module, adapt(model, config))
    for name, module in plain.items():  # peft wraps a shared layer under one of its names
        for alias in aliases[id(module)]:
            if model.get_submodule(alias) is module:
                model.set_submodule(alias, model.get_submodule(name))
    for name, solution in solutions.items():
        layer: Any = model.get_submodule(name)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(solution.a)
            layer.lora_B["default"].weight.copy_(solution.b)
    return adapted
