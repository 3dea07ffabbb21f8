"""Makes the plan of a recipe for a source, only from headers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from loftq.core import allocation
from loftq.errors import SourceError
from loftq.formats import adapter
from loftq.formats.adapter_targets import target_names
from loftq.formats.checkpoint import Shard, TensorSpec, dtype_of, lay_out, parse_size
from loftq.formats.layouts import LAYOUTS, Layout
from loftq.formats.model_config import read_config
from loftq.formats.prequantized import READABLE, DenseView, dense_view
from loftq.hub.source import Source
from loftq.models import linears, naming
from loftq.models.expert_stacks import find_stacks
from loftq.models.families import family_of
from loftq.models.language_part import language_part
from loftq.models.linears import DenseLinear, Linears
from loftq.models.loader_probe import runs_packed
from loftq.models.naming import NameMap
from loftq.models.tasks import Task, build_meta
from loftq.planning.experts import Experts
from loftq.planning.fitting import Fitting
from loftq.planning.kept_share import kept_share
from loftq.planning.notes import notes_on
from loftq.planning.plan import Layer, Plan
from loftq.planning.recipe import Recipe
from loftq.planning.weights import check_quantizable, refuse_narrow

POOLER = "pooler"  # checkpoints of masked language models often lack it, and transformers initializes it


def make_plan(
    source: Source,
    recipe: Recipe,
    *,
    trust_remote_code: bool = False,
    widths: Mapping[str, float] | None = None,
    with_experts: bool = True,
) -> Plan:
    """Make the plan of a recipe for a source. Raises SourceError or OptionError, with the change that is needed.

    Unless `with_experts`, fused experts stay as they are. `widths` are the bits of each module if a run measures
    them; until they are known, the plan has the same size as the final one.
    """
    source = _with_dense_weights(source)
    model, task = build_meta(
        source.folder,
        task=recipe.task,
        num_labels=recipe.num_labels,
        trust_remote_code=trust_remote_code,
        tensors=len(source.checkpoint.tensors),
    )
    if family_of(str(model.config.model_type)).float32:  # type: ignore[union-attr]
        recipe = replace(recipe, compute_dtype="float32")
    model_linears = linears.find_linears(model)
    targets = _targets(model, task, model_linears, recipe, source)
    heads = model_linears.heads if task.has_head else ()
    resized = heads if recipe.num_labels is not None else ()
    names = naming.map_names(model, source.checkpoint.tensors, new=(*heads, POOLER), resized=resized)
    saved = (*heads, *_new_poolers(names)) if task.has_head else ()
    experts = Experts(model, names, source.checkpoint, recipe if with_experts else recipe.without_experts())
    if not experts.layers:
        recipe = recipe.without_experts()
    chosen = {target: model_linears.candidates[target] for target in targets}
    fitting = Fitting(model, chosen, recipe, with_experts=bool(experts.layers))
    targets, format = list(fitting.targets), fitting.format
    _check_code(model, targets, source)
    layers = tuple(_layer(target, layer, names.source, source, recipe) for target, layer in fitting.targets.items())
    layers = (*_allocate(layers, recipe, widths), *experts.layers)
    quantized = {name for layer in layers for name in layer.tensors}
    passed, created = _kept(names, source, quantized, saved, recipe)
    plan = Plan(
        recipe=recipe,
        source=source,
        model=model,
        task=task,
        layers=layers,
        passed=passed,
        created=created,
        backbone=_lay_out_backbone(layers, names, {**passed, **created}, recipe, LAYOUTS[format]),
        adapter=lay_out_adapter(layers, {**passed, **created}, recipe),
        target_modules=tuple(target_names(targets, [name for name, _ in model.named_modules()])),
        target_parameters=experts.target_parameters,
        modules_to_save=saved,
        skip_modules=tuple(linears.skip_modules(model, model_linears, targets)),
        format=format,
        notes=(),
    )
    notes = [*notes_on(plan, model_linears, names), *experts.notes(plan)]
    notes += [*kept_share(plan, model_linears, experts.reasons), *fitting.notes(recipe.compute_dtype)]
    return replace(plan, notes=tuple(notes))


def _with_dense_weights(source: Source) -> Source:
    """The source, with the dense weights that its quantized ones stand for. Raises SourceError if they are unknown."""
    config = read_config(source.folder, tensors=len(source.checkpoint.tensors))
    quantization = config.get("quantization_config")
    if not quantization or isinstance(source.checkpoint, DenseView):
        return source
    dense = dense_view(source.checkpoint, quantization, dtype_of(config)) if isinstance(quantization, dict) else None
    if dense is None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise SourceError(
            f"{source.name} is already quantized ({method}): start from the full-precision weights that it was made "
            f"from (loftq reads originals in {' or '.join(READABLE)} alone)"
        )
    return replace(source, checkpoint=dense)


def _targets(model: nn.Module, task: Task, model_linears: Linears, recipe: Recipe, source: Source) -> list[str]:
    """The modules to quantize: those of the recipe, or else those of the family, or else all of the language model."""
    if not model_linears.candidates:
        kinds = ", ".join(sorted(set(model_linears.others.values()))) or "none"
        raise SourceError(f"{source.name} has no linear layer that can be quantized (its other dense layers: {kinds})")
    wanted = recipe.target_modules
    if wanted is None:
        usual = family_of(str(model.config.model_type)).targets  # type: ignore[union-attr]
        names = list(model_linears.candidates)
        reached = [p for p in usual or () if any(linears.reaches(p, name) for name in names)]
        part = language_part(model, task.name, names)
        wanted = tuple(reached) or (None if part is None else (f"{part}.*",))
    stacks = list(find_stacks(model).candidates)
    return linears.select(model, model_linears, wanted, recipe.exclude_modules, stacks)


def _check_code(model: nn.Module, targets: Sequence[str], source: Source) -> None:
    """Raise SourceError if the code of a model needs dense weights. Families of the table are tested, so not tried."""
    model_type = str(model.config.model_type)  # type: ignore[union-attr]
    if not family_of(model_type).tested and not runs_packed(model, targets):
        raise SourceError(
            f"{source.name} cannot be quantized: the code of {model_type} in transformers uses the weights of its "
            "linears directly, so it needs dense ones"
        )


def _layer(module: str, dense: DenseLinear, origin: Mapping[str, str], source: Source, recipe: Recipe) -> Layer:
    key = f"{module}.weight"
    last = module.rpartition(".")[2]
    if key not in origin:
        raise SourceError(
            f"{key} is made of several checkpoint tensors, or of a part of one, which cannot be streamed: "
            f"add --exclude-modules {last}"
        )
    spec = source.checkpoint.tensors[origin[key]]
    check_quantizable(spec)
    return Layer(module, spec.name, dense.shape, dense.transposed, rank=recipe.rank)


def _new_poolers(names: NameMap) -> list[str]:
    """Newly initialized poolers before a head, which must be trained with it."""
    keys = [key.partition(f".{POOLER}.") for key in names.created]
    return list(dict.fromkeys(f"{before}.{POOLER}" for before, found, _ in keys if found))


def _allocate(layers: tuple[Layer, ...], recipe: Recipe, widths: Mapping[str, float] | None) -> tuple[Layer, ...]:
    """The layers with their bits."""
    if widths is not None:
        return tuple(replace(layer, bits=widths[layer.module]) for layer in layers)
    if len(recipe.widths) == 1:
        return tuple(replace(layer, bits=recipe.widths[0]) for layer in layers)
    bits = allocation.first([layer.weights for layer in layers], recipe.widths[0], recipe.widths[-1], recipe.bits)
    return tuple(replace(layer, bits=width) for layer, width in zip(layers, bits, strict=True))


def _kept(
    names: NameMap, source: Source, quantized: Collection[str], saved: Sequence[str], recipe: Recipe
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """The written form of the tensors of the source that are not quantized, and of parameters that no tensor provides.

    By the names of the tensors, and of the parameters.
    """
    tensors = source.checkpoint.tensors
    passed = {
        name: _kept_spec(key, tensors[name], saved, recipe)
        for name, key in names.written.items()
        if name not in quantized
    }
    created = {
        key: _kept_spec(key, TensorSpec(key, torch.float32, shape), saved, recipe)
        for key, shape in names.created.items()
    }
    return passed, created


def _kept_spec(key: str, spec: TensorSpec, saved: Sequence[str], recipe: Recipe) -> TensorSpec:
    """The written form of an unquantized tensor: in the compute dtype or, for a head, in that of the adapter."""
    if not spec.dtype.is_floating_point:
        return TensorSpec(key, spec.dtype, spec.shape)
    refuse_narrow(spec)
    if any(key.startswith(f"{module}.") for module in saved):
        return TensorSpec(adapter.key_of(key), torch.float32, spec.shape)
    return TensorSpec(key, recipe.dtype, spec.shape)


def _lay_out_backbone(
    layers: tuple[Layer, ...], names: NameMap, kept: Mapping[str, TensorSpec], recipe: Recipe, layout: Layout
) -> tuple[Shard, ...]:
    by_tensor = {name: layer for layer in layers for name in layer.tensors}
    groups, placed = [], set()
    for name in [*names.written, *names.created]:
        layer = by_tensor.get(name)
        if layer is not None and layer.module in placed:
            continue  # another tensor of the same experts
        if layer is not None:
            placed.add(layer.module)
            groups.append(layout.specs(layer.module, layer.shape, recipe.grid(layer.bits), recipe.dtype))
        elif not adapter.is_key(kept[name].name):
            groups.append([kept[name]])
    return tuple(lay_out(groups, parse_size(recipe.max_shard_size)))


def lay_out_adapter(layers: tuple[Layer, ...], kept: Mapping[str, TensorSpec], recipe: Recipe) -> Shard:
    """The file of an adapter: the factors of the layers, and those of the tensors that it holds as a whole."""
    specs = [
        spec for layer in layers for spec in adapter.specs(layer.module, layer.shape, layer.rank, recipe.pool_size)
    ]
    specs += [spec for spec in kept.values() if adapter.is_key(spec.name)]
    return lay_out([specs], max(sum(spec.nbytes for spec in specs), 1), f"{adapter.FOLDER}/{adapter.WEIGHTS}")[0]
