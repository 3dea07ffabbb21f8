"""The correspondence of checkpoint tensors and model parameters, by transformers' own renaming.

The model is built on the meta device by the class with which transformers would load it. The renaming of this class
says which checkpoint tensor becomes which parameter, so that nothing is guessed from parts of names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from loftq.errors import CheckpointError
from loftq.formats.checkpoint import TensorSpec


@dataclass(frozen=True)
class NameMap:
    """The correspondence of checkpoint tensors and model parameters.

    `written` maps each checkpoint tensor that is kept to the name under which it is written. `source` maps a parameter
    to the checkpoint tensor from which it comes unchanged. `left_out` names the tensors that the model does not use.
    `created` has the parameters, with their shapes, that no tensor provides and that are initialized anew. `fused` maps
    a parameter that is fused from several tensors, or the first parameter of those into which a tensor is split, to
    these tensors, each with the pattern that it matches, in order.
    """

    written: Mapping[str, str]
    source: Mapping[str, str]
    left_out: tuple[str, ...]
    created: Mapping[str, tuple[int, ...]]
    fused: Mapping[str, Sequence[tuple[str, str]]]


def map_names(
    model: nn.Module, tensors: Mapping[str, TensorSpec], *, new: Collection[str] = (), resized: Collection[str] = ()
) -> NameMap:
    """Match a checkpoint's tensors with the model's parameters as transformers does when it loads them.

    A tensor that is fused or split while loading keeps its own name; others are written under the name of the
    parameter. Parameters of the modules `new` may be missing from the checkpoint, and the shapes of those of `resized`
    may differ: these parameters are created. Raises CheckpointError for any other parameter that no tensor provides or
    whose shape differs.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    built = cast(Any, model)
    transforms = get_model_conversion_mapping(built)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = built.state_dict()
    prefix = built.base_model_prefix
    tied: dict[str, str] = dict(built.all_tied_weights_keys)

    written: dict[str, str] = {}
    source: dict[str, str] = {}
    left_out: list[str] = []
    provided: set[str] = set()
    fused: dict[str, list[tuple[str, str]]] = {}
    for name in tensors:
        key, converted = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, converted = name, None
        if key not in state:
            left_out.append(name)
            continue
        provided.add(key)
        written[name] = name if converted else key
        if converted:
            fused.setdefault(key, []).append((name, converted))
            provided |= _split_into(key, converted, converters)
        else:
            source[key] = name
    for copy, original in tied.items():
        if copy in source and original in source:  # a single copy on disk is enough: loading ties them again
            left_out.append(source.pop(copy))
            del written[left_out[-1]]
    for key in [key for key in source if _has_part(key, resized) and tensors[source[key]].shape != state[key].shape]:
        left_out.append(source.pop(key))
        del written[left_out[-1]]
        provided.discard(key)
    created = _missing(built, state, provided, tied)
    _check_complete([key for key in created if not _has_part(key, new)])
    _check_shapes(state, source, tensors)
    for parts in fused.values():
        parts.sort(key=lambda part: dot_natural_key(part[0]))  # expert 10 after expert 9
    shapes = {key: tuple(state[key].shape) for key in created}
    return NameMap(written, source, tuple(sorted(left_out)), shapes, fused)


def _has_part(key: str, modules: Collection[str]) -> bool:
    """Whether a module of one of these names holds a parameter, at any depth: `score` holds `model.score.weight`."""
    return any(f".{module}." in f".{key}" for module in modules)


def _split_into(key: str, pattern: str, converters: Iterable[Any]) -> set[str]:
    """The parameters into which a tensor is split that matches a pattern; `key` is the first of them."""
    targets = next(c.target_patterns for c in converters if pattern in c.source_patterns)
    return {key.replace(targets[0], target) for target in targets}


def _missing(
    model: Any, state: Mapping[str, torch.Tensor], provided: Collection[str], tied: Mapping[str, str]
) -> list[str]:
    """Entries of the state that no tensor provides, except those that the model itself allows to be missing."""

    originals = {original for copy, original in tied.items() if copy in provided}

    def tied_to_provided(key: str) -> bool:
        return tied.get(key) in provided or key in originals

    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [
        key
        for key in state
        if key not in provided and not tied_to_provided(key) and not any(p.search(key) for p in ignored)
    ]


def _check_complete(missing: Sequence[str]) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the checkpoint lacks the tensor {missing[0]!r}{more}, which the model's config requires: "
            "download it again, or correct config.json"
        )


def _check_shapes(
    state: Mapping[str, torch.Tensor], source: Mapping[str, str], tensors: Mapping[str, TensorSpec]
) -> None:
    for key, name in source.items():
        if tensors[name].shape != tuple(state[key].shape):
            raise CheckpointError(
                f"tensor {name!r} has shape {tensors[name].shape}, but the config requires {tuple(state[key].shape)}: "
                "download the checkpoint again, or correct config.json"
            )


def fuse(model: nn.Module, key: str, parts: Iterable[tuple[str, str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The parameters, by name, that transformers makes of the `parts` of a key of `NameMap.fused`.

    Each part is the name of a tensor, the pattern that it matches, and the tensor.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    built = cast(Any, model)
    converters = [t for t in get_model_conversion_mapping(built) if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    converter: Any = None
    for name, pattern, tensor in parts:
        converter = deepcopy(by_pattern[pattern]) if converter is None else converter
        converter.add_tensor(key, name, pattern, tensor)
    parameters = converter.convert(key, model=built, config=built.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in parameters.items()}


def unfuse(model: nn.Module, key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, by name, that transformers makes of a parameter when it saves a model."""
    from transformers.core_model_loading import revert_weight_conversion

    made: dict[str, torch.Tensor] = revert_weight_conversion(cast(Any, model), {key: tensor})
    return made


def initial_tensor(model: nn.Module, key: str, seed: int) -> torch.Tensor:
    """Initialize a parameter from a seed as the model's own class does, in float32."""
    owner, _, name = key.rpartition(".")
    module = deepcopy(model.get_submodule(owner)).to_empty(device="cpu").float()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        cast(Any, model)._init_weights(module)
    parameter: torch.Tensor = module.state_dict()[name]
    return parameter
