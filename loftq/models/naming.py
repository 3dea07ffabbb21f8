"""Module names and checkpoint names, from a model built without memory.

A model is built on the meta device from its config, by the class that transformers would load it with:
its modules say what can be quantized, and transformers' own renaming says which checkpoint tensor becomes
which parameter. Nothing is guessed from a substring of a path.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from loftq.errors import CheckpointError, OptionError, SourceError
from loftq.formats.checkpoint import TensorSpec


def build_meta(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model of a checkpoint folder, on the meta device.

    Raises SourceError for a model type that transformers does not know, for one that needs code of its own
    without `trust_remote_code`, and for one that is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        named = [str(name) for name in config.architectures or ()]
    except Exception as error:  # a config's own class may raise anything for values that make no sense
        raise SourceError(_config_problem(folder, error)) from error
    refusal = SourceError(
        f"{folder} is a {config.model_type} model ({', '.join(named) or 'no architecture named'}), "
        "not a causal language model: those are what can be quantized"
    )
    if type(config) not in AutoModelForCausalLM._model_mapping and not hasattr(config, "auto_map"):
        raise refusal
    try:
        with torch.device("meta"):
            model = cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # so may a model's
        raise SourceError(_config_problem(folder, error)) from error
    base = getattr(model, model.base_model_prefix, model)
    if named and not {type(model).__name__, type(base).__name__} & set(named):
        raise refusal
    return cast(nn.Module, model)


def _config_problem(folder: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"{folder} needs Python code of its own to load: read that code, then add --trust-remote-code"
    if "model type" in text or "model_type" in text:
        from transformers import __version__

        found = re.search(r"model type `?'?(\w+)", text)
        named = f"model type {found[1]!r}" if found else "model type"
        return f"{folder / 'config.json'}: transformers {__version__} does not know its {named}: upgrade transformers"
    return f"{folder / 'config.json'} describes no model that transformers can build: {text or type(error).__name__}"


@dataclass(frozen=True)
class Linears:
    """The linears of a model: those that can be quantized, by name, and the output heads, which are left."""

    candidates: Mapping[str, nn.Linear]
    heads: tuple[str, ...]
    others: Mapping[str, str]  # dense layers of another class, name to class: stock loaders do not convert them


def find_linears(model: nn.Module) -> Linears:
    """Sort a model's dense layers. Stock transformers converts `nn.Linear` itself, not its subclasses."""
    head = cast(Any, model).get_output_embeddings()
    candidates: dict[str, nn.Linear] = {}
    heads: list[str] = []
    others: dict[str, str] = {}
    for name, module in model.named_modules():
        if module is head:
            heads.append(name)
        elif type(module) is nn.Linear:
            candidates[name] = module
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            others[name] = type(module).__name__
    return Linears(candidates, tuple(heads), others)


def select(names: Sequence[str], targets: Sequence[str] | None, excluded: Sequence[str]) -> list[str]:
    """The names that `targets` (default: all) reach and `excluded` do not, in the order given.

    A pattern is a module's name, the end of one after a dot (`q_proj`), or either with `*` and `?`. A pattern
    that reaches nothing raises OptionError with the names that exist.
    """
    for option, patterns in (("--target-modules", targets or ()), ("--exclude-modules", excluded)):
        for pattern in patterns:
            if not any(_reaches(pattern, name) for name in names):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
                raise OptionError(f"{option} {pattern!r} matches no linear layer of this model (it has: {known})")
    chosen = [name for name in names if targets is None or any(_reaches(p, name) for p in targets)]
    chosen = [name for name in chosen if not any(_reaches(p, name) for p in excluded)]
    if not chosen:
        raise OptionError("--exclude-modules leaves no linear layer to quantize: name fewer")
    return chosen


def _reaches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


@dataclass(frozen=True)
class NameMap:
    """How checkpoint tensors and model parameters correspond.

    `written` gives each checkpoint tensor that is kept the name under which it is written; `source` gives a
    parameter the checkpoint tensor it comes from unchanged; `left_out` names the tensors that the model has
    no use for.
    """

    written: Mapping[str, str]
    source: Mapping[str, str]
    left_out: tuple[str, ...]


def map_names(model: nn.Module, tensors: Mapping[str, TensorSpec]) -> NameMap:
    """Match a checkpoint's tensors with the model's parameters as transformers would on loading.

    A tensor that is fused or split on the way in keeps its own name; others are written under the
    parameter's. Raises CheckpointError for a parameter that no tensor provides or that has another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

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
    for name in tensors:
        key, converted = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, converted = name, None
        if key not in state:
            left_out.append(name)
            continue
        provided.add(key)
        written[name] = name if converted else key
        if not converted:
            source[key] = name
    for copy, original in tied.items():
        if copy in source and original in source:  # one copy on disk is enough: loading ties them again
            left_out.append(source.pop(copy))
            del written[left_out[-1]]
    _check_complete(state, provided, tied)
    _check_shapes(state, source, tensors)
    return NameMap(written, source, tuple(sorted(left_out)))


def _check_complete(state: Mapping[str, torch.Tensor], provided: Collection[str], tied: Mapping[str, str]) -> None:
    def tied_to_provided(key: str) -> bool:
        return tied.get(key) in provided or any(copy in provided for copy, to in tied.items() if to == key)

    missing = [key for key in state if key not in provided and not tied_to_provided(key)]
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


def skip_modules(linears: Linears, targets: Iterable[str]) -> list[str]:
    """What `llm_int8_skip_modules` must list so that stock transformers converts the targets and no more."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    wanted = set(targets)
    rest = [name for name in linears.candidates if name not in wanted]
    skipped = [*linears.heads, *rest]
    converted = {name for name in linears.candidates if should_convert_module(name, skipped)}
    if converted != wanted:
        lost = sorted(wanted - converted)[0]
        raise OptionError(
            f"transformers cannot load {lost!r} quantized beside an excluded module whose name it ends with: "
            "exclude both or neither"
        )
    return skipped
