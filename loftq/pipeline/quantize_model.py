"""`quantize_model`: LoftQ on any module in memory, with no checkpoint and no transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from loftq.core.blockwise import BlockQuantizer
from loftq.core.solver import Solution, solve
from loftq.errors import OptionError
from loftq.formats import bitsandbytes, native
from loftq.formats.layouts import LAYOUTS, choose
from loftq.models.linears import Dense, Linears, select
from loftq.models.loading import guard_cpu
from loftq.pipeline.recipe import BITS, Recipe, layer_seed

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit

    from loftq.models.packed_linear import PackedLinear


def quantize_model(
    model: nn.Module,
    target_modules: Sequence[str] | None = None,
    *,
    exclude_modules: Sequence[str] = (),
    bits: int = 4,
    rank: int = 16,
    iters: int = 5,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    double_quant: bool = False,
    block_size: int = 64,
    compute_dtype: torch.dtype | None = None,
    svd: str = "krylov",
    seed: int = 0,
    lora: bool = True,
    quantize: bool = True,
) -> nn.Module:
    """Quantize the linears of `model` in place and give them LoRA adapters that repair the error.

    `target_modules` are names or patterns; by default every `nn.Linear`. Weights become bitsandbytes'
    `Linear4bit`, or our `PackedLinear` at 2 and 3 bits; biases stay, and the adapters are peft's: the return value
    is a `PeftModel` around `model`.
    `quantize=False` leaves the weights and starts plain LoRA (B = 0); `lora=False` quantizes alone and
    returns `model` itself. A linear that is quantized already is not quantized again: it gets a plain LoRA.
    `compute_dtype` defaults to each weight's own. Raises OptionError.
    """
    if not lora and not quantize:
        raise OptionError("lora=False and quantize=False leave nothing to do")
    recipe = Recipe(
        bits=bits,
        rank=rank,
        iters=iters,
        alpha=alpha,
        rslora=rslora,
        dropout=dropout,
        double_quant=double_quant,
        block_size=block_size,
        svd=svd,
        seed=seed,
    )
    targets = _find_targets(model, target_modules, exclude_modules)
    for name, module in targets.items():
        _check_fits(name, module, recipe, quantize=quantize, lora=lora)
    if recipe.allocation is not None:
        raise OptionError(f"bits={bits}: quantize_model gives every layer the same width, 2, 3 or 4")
    format = choose(BITS[recipe.widths[0]], block_size, None)
    solutions: dict[str, Solution] = {}
    for name, module in targets.items() if quantize else ():
        if type(module) is nn.Linear:
            quantizer = recipe.quantizer(LAYOUTS[format], recipe.widths[0])
            solutions[name] = _solve(name, module, recipe, quantizer, rank if lora else 0)
            make = _linear4bit if format == "bitsandbytes" else _packed_linear
            _replace(model, module, make(module, quantizer, solutions[name], compute_dtype))
    guard_cpu(model)
    return _attach(model, list(targets), recipe, solutions) if lora else model


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under every name that it goes by."""
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(name, new)


def _find_targets(model: nn.Module, wanted: Sequence[str] | None, excluded: Sequence[str]) -> dict[str, nn.Linear]:
    from bitsandbytes.nn import Linear4bit

    from loftq.models.packed_linear import PackedLinear

    quantized = (Linear4bit, PackedLinear)
    found = {name: m for name, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, quantized)}
    if not found:
        raise OptionError(f"{type(model).__name__} holds no nn.Linear: there is nothing to quantize")
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise OptionError("the model has LoRA adapters already: merge or unload them first")
    shapes = {name: Dense((module.out_features, module.in_features)) for name, module in found.items()}
    return {name: found[name] for name in select(model, Linears(shapes), wanted, excluded)}


def _check_fits(name: str, module: nn.Linear, recipe: Recipe, *, quantize: bool, lora: bool) -> None:
    rows, columns = module.out_features, module.in_features
    if lora and recipe.rank > min(rows, columns):
        raise OptionError(f"rank {recipe.rank} is larger than the smaller side of {name!r} ({rows} x {columns})")
    if quantize and type(module) is nn.Linear:
        if columns % recipe.block_size:
            raise OptionError(
                f"block size {recipe.block_size} does not divide the inputs of {name!r} ({rows} x {columns})"
            )
        if not bool(torch.isfinite(module.weight).all()):
            raise OptionError(f"the weight of {name!r} holds NaN or Inf: leave it out with exclude_modules")


def _solve(name: str, module: nn.Linear, recipe: Recipe, quantizer: BlockQuantizer, rank: int) -> Solution:
    weight = module.weight.detach().float().contiguous()
    seed = layer_seed(recipe.seed, name)
    return solve(weight, quantizer, rank, recipe.iters, recipe.scaling, svd=recipe.svd, seed=seed)


def _linear4bit(
    linear: nn.Linear, quantizer: BlockQuantizer, solution: Solution, compute_dtype: torch.dtype | None
) -> Linear4bit:
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype = compute_dtype or linear.weight.dtype
    shape = tuple(linear.weight.shape)
    packed = bitsandbytes.tensors("", shape, quantizer, dtype, solution.codes, solution.scales)
    stored = {name.removeprefix(".weight").lstrip("."): tensor for name, tensor in packed.items()}
    with torch.device("meta"):
        quantized = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4"
        )
    weight = stored.pop("")
    quantized.weight = Params4bit.from_prequantized(weight, stored, device=linear.weight.device, module=quantized)
    quantized.bias = linear.bias
    return quantized.train(linear.training)


def _packed_linear(
    linear: nn.Linear, quantizer: BlockQuantizer, solution: Solution, compute_dtype: torch.dtype | None
) -> PackedLinear:
    from loftq.models.packed_linear import PackedLinear

    packed = PackedLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        codebook=quantizer.codebook,
        block_size=quantizer.block_size,
        double_quant=quantizer.double_quant,
        dtype=compute_dtype or linear.weight.dtype,
        device=linear.weight.device,
    )
    shape = tuple(linear.weight.shape)
    stored = native.tensors("", shape, quantizer, linear.weight.dtype, solution.codes, solution.scales)
    for name, tensor in stored.items():
        getattr(packed, name.lstrip(".")).data.copy_(tensor)
    packed.bias = linear.bias
    return packed.train(linear.training)


def _attach(model: nn.Module, names: list[str], recipe: Recipe, solutions: dict[str, Solution]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        target_modules=names,
    )
    plain = {name: model.get_submodule(name) for name in names}
    adapted = cast(nn.Module, get_peft_model(model, config))
    for name, module in plain.items():  # peft wraps a shared layer under one of its names
        wrapped = model.get_submodule(name)
        for alias in [a for a, m in model.named_modules(remove_duplicate=False) if m is module]:
            if not alias.endswith(".base_layer"):
                model.set_submodule(alias, wrapped)
    for name, solution in solutions.items():
        layer: Any = model.get_submodule(name)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(solution.a)
            layer.lora_B["default"].weight.copy_(solution.b)
    return adapted
