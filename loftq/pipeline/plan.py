"""What a run will do, from headers alone: every check that can be made before the first weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from loftq.errors import CheckpointError, OptionError, SourceError
from loftq.formats import adapter, bitsandbytes
from loftq.formats.checkpoint import Shard, TensorSpec, lay_out, parse_size
from loftq.models import naming
from loftq.models.families import family_of
from loftq.pipeline.recipe import Recipe
from loftq.pipeline.source import Source

_SOLVER_BYTES = 13  # a weight in solution: float32 twice, its source, its codes, their packed form, a sketch


@dataclass(frozen=True)
class Layer:
    """A linear to quantize: its module, the checkpoint tensor it comes from, its shape (out, in)."""

    module: str
    tensor: str
    shape: tuple[int, int]

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Plan:
    """Layers to quantize, tensors to pass through (source name to written name), and where all bytes go."""

    recipe: Recipe
    source: Source
    model_type: str
    layers: tuple[Layer, ...]
    passed: Mapping[str, str]
    backbone: tuple[Shard, ...]
    adapter: Shard
    target_modules: tuple[str, ...]
    skip_modules: tuple[str, ...]
    task_type: str
    notes: tuple[str, ...]

    @cached_property
    def layer_bits(self) -> float:
        """Bits a weight of the quantized linears, scales and all else counted."""
        stored = sum(self._stored(layer) for layer in self.layers)
        return 8 * stored / self.weights

    @cached_property
    def weights(self) -> int:
        """Weights in the quantized linears."""
        return sum(layer.weights for layer in self.layers)

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(spec.nbytes for spec in self.source.checkpoint.tensors.values())

    @property
    def backbone_bytes(self) -> int:
        """Bytes of the backbone's files."""
        return sum(shard.nbytes for shard in self.backbone)

    def memory(self, workers: int) -> int:
        """An estimate of the bytes that solving needs above the program itself."""
        largest = max(layer.weights for layer in self.layers) * _SOLVER_BYTES
        tensors = self.source.checkpoint.tensors
        passed = max((2 * tensors[name].nbytes for name in self.passed), default=0)
        return workers * max(largest, passed)

    def bits_of(self, layer: Layer) -> float:
        """Bits a weight of one layer on disk."""
        return 8 * self._stored(layer) / layer.weights

    def _stored(self, layer: Layer) -> int:
        specs = bitsandbytes.specs(layer.module, layer.shape, self.recipe.quantizer, self.recipe.dtype)
        return sum(spec.nbytes for spec in specs)


def make_plan(source: Source, recipe: Recipe, *, trust_remote_code: bool = False) -> Plan:
    """Resolve a recipe against a source. Raises SourceError or OptionError with what to change."""
    _refuse_quantized(source)
    model = naming.build_meta(source.folder, trust_remote_code=trust_remote_code)
    model_type = str(model.config.model_type)  # type: ignore[union-attr]
    linears = naming.find_linears(model)
    notes = []
    if not linears.candidates:
        kinds = ", ".join(sorted(set(linears.others.values()))) or "none"
        raise SourceError(
            f"{source.name}: no dense layer that stock transformers loads quantized (its dense layers: {kinds})"
        )
    family = family_of(model_type)
    if not family.tested:
        notes.append(f"model type {model_type} has no row of its own: quantized the generic way, by its modules")
    if linears.others:
        kinds = ", ".join(sorted(set(linears.others.values())))
        notes.append(f"{len(linears.others)} dense layers of class {kinds} stay in {recipe.compute_dtype}")
    targets = naming.select(list(linears.candidates), recipe.target_modules, recipe.exclude_modules)
    names = naming.map_names(model, source.checkpoint.tensors)
    notes += [f"not part of the model, left out: {name}" for name in names.left_out]
    layers = tuple(_layer(target, names.source, source, recipe) for target in targets)
    quantized = {layer.tensor for layer in layers}
    passed = {name: key for name, key in names.written.items() if name not in quantized}
    return Plan(
        recipe=recipe,
        source=source,
        model_type=model_type,
        layers=layers,
        passed=passed,
        backbone=_lay_out_backbone(layers, names.written, source, recipe),
        adapter=_lay_out_adapter(layers, recipe),
        target_modules=tuple(adapter.target_names(targets, [name for name, _ in model.named_modules()])),
        skip_modules=tuple(naming.skip_modules(linears, targets)),
        task_type=family.task_type,
        notes=tuple(notes),
    )


def _refuse_quantized(source: Source) -> None:
    path = source.folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{source.name} has no config.json: expected a model that transformers saved")
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise SourceError(f"{path} is not a JSON object ({error}): download it again") from error
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise SourceError(f"{source.name} is already quantized ({method}): start from its full-precision weights")


def _layer(module: str, origin: Mapping[str, str], source: Source, recipe: Recipe) -> Layer:
    key = f"{module}.weight"
    if key not in origin:
        raise SourceError(
            f"{key} is made of several checkpoint tensors when it is loaded, which cannot be streamed: "
            f"add --exclude-modules {module.rpartition('.')[2]}"
        )
    spec = source.checkpoint.tensors[origin[key]]
    if spec.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(f"tensor {spec.name!r} has dtype {spec.dtype}: expected 16 or 32 bits, not quantized")
    rows, columns = spec.shape
    if recipe.rank > min(rows, columns):
        raise OptionError(
            f"--rank {recipe.rank} is larger than the smaller side of {module} ({rows} x {columns}): "
            f"use at most {min(rows, columns)}, or --exclude-modules {module.rpartition('.')[2]}"
        )
    if columns % recipe.block_size:  # blocks across rows are legal, but bitsandbytes reads them wrongly on the CPU
        fitting = [size for size in bitsandbytes.BLOCK_SIZES if columns % size == 0]
        advice = f"use --block-size {fitting[-1]}" if fitting else f"--exclude-modules {module.rpartition('.')[2]}"
        raise OptionError(
            f"--block-size {recipe.block_size} does not divide the {columns} inputs of {module} "
            f"({rows} x {columns}): {advice}"
        )
    return Layer(module, spec.name, (rows, columns))


def _lay_out_backbone(
    layers: tuple[Layer, ...], written: Mapping[str, str], source: Source, recipe: Recipe
) -> tuple[Shard, ...]:
    by_tensor = {layer.tensor: layer for layer in layers}
    groups = []
    for name, key in written.items():
        layer = by_tensor.get(name)
        if layer is None:
            groups.append([passed_spec(source.checkpoint.tensors[name], key, recipe.dtype)])
        else:
            groups.append(bitsandbytes.specs(layer.module, layer.shape, recipe.quantizer, recipe.dtype))
    return tuple(lay_out(groups, parse_size(recipe.max_shard_size)))


def _lay_out_adapter(layers: tuple[Layer, ...], recipe: Recipe) -> Shard:
    specs = [spec for layer in layers for spec in adapter.specs(layer.module, layer.shape, recipe.rank)]
    return lay_out([specs], max(sum(spec.nbytes for spec in specs), 1), f"{adapter.FOLDER}/{adapter.WEIGHTS}")[0]


def passed_spec(spec: TensorSpec, key: str, dtype: torch.dtype) -> TensorSpec:
    """How a tensor that is not quantized is written: floating point in the compute dtype, the rest as it is."""
    return TensorSpec(key, dtype if spec.dtype.is_floating_point else spec.dtype, spec.shape)
