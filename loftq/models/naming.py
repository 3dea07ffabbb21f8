"""Checkpoint names and parameter names, by transformers' own renaming.

The model is on the meta device, built by the class that transformers would load it with: its renaming says
which checkpoint tensor becomes which parameter. Nothing is guessed from a substring of a path.
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
    """How checkpoint tensors and model parameters correspond.

    `written` gives each checkpoint tensor that is kept the name under which it is written; `source` gives a
    parameter the checkpoint tensor it comes from unchanged; `left_out` names the tensors that the model has
    no use for; `created` the parameters, with their shapes, that no tensor provides and that begin anew; `fused` gives
    a parameter that is made of several tensors, or the first of those that one is parted into, the tensors with the
    pattern that each matches, in order.
    """

    written: Mapping[str, str]
    source: Mapping[str, str]
    left_out: tuple[str, ...]
    created: Mapping[str, tuple[int, ...]]
    fused: Mapping[str, Sequence[tuple[str, str]]]


def map_names(
    model: nn.Module, tensors: Mapping[str, TensorSpec], *, new: Collection[str] = (), resized: Collection[str] = ()
) -> NameMap:
    """Match a checkpoint's tensors with the model's parameters as transformers would on loading.

    A tensor that is fused or split on the way in keeps its own name; others are written under the
    parameter's. Parameters of the modules `new` may be missing, and those of `resized` may have another shape
    than the checkpoint's: they are created. Raises CheckpointError for any other that no tensor provides or that
    has another shape.
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
        else:
            source[key] = name
    for copy, original in tied.items():
        if copy in source and original in source:  # one copy on disk is enough: loading ties them again
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


def _missing(
    model: Any, state: Mapping[str, torch.Tensor], provided: Collection[str], tied: Mapping[str, str]
) -> list[str]:
    """Entries of the state that nothing provides, but for those that the model itself says may be missing."""

    def tied_to_provided(key: str) -> bool:
        return tied.get(key) in provided or any(copy in provided for copy, to in tied.items() if to == key)

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
            f"the checkpoint lacks the tensor {missing[0]!r}{more}, which the model's config asks for: "
            "download it again, or correct config.json"
        )


def _check_shapes(
    state: Mapping[str, torch.Tensor], source: Mapping[str, str], tensors: Mapping[str, TensorSpec]
) -> None:
    for key, name in source.items():
        if tensors[name].shape != tuple(state[key].shape):
            raise CheckpointError(
                f"tensor {name!r} has shape {tensors[name].shape}, the config asks for {tuple(state[key].shape)}"
            )


def fuse(model: nn.Module, key: str, parts: Iterable[tuple[str, str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The parameters that transformers makes of the tensors of one row of `NameMap.fused`, each with its pattern."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    built = cast(Any, model)
    converters = [t for t in get_model_conversion_mapping(built) if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    converter: Any = None
    for name, pattern, tensor in parts:
        converter = deepcopy(by_pattern[pattern]) if converter is None else converter
        converter.add_tensor(key, name, pattern, tensor)
    made = converter.convert(key, model=built, config=built.config)
    return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}


def initial_tensor(model: nn.Module, key: str, seed: int) -> torch.Tensor:
    """A parameter that begins anew, in float32, as the model's own class initializes it, from a seed."""
    owner, _, name = key.rpartition(".")
    module = deepcopy(model.get_submodule(owner)).to_empty(device="cpu").float()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        cast(Any, model)._init_weights(module)
    found: torch.Tensor = module.state_dict()[name]
    return found
