"""The linears of a model: which can be quantized, which are chosen, and what stock transformers makes of them.

All of it is read from the modules of the model itself. Stock transformers loads `nn.Linear` and `Conv1D`
quantized, but no subclass of `nn.Linear`; of those, the ones that compute what `nn.Linear` does can be loaded
by our own plug-in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from loftq.errors import OptionError


@dataclass(frozen=True)
class DenseLinear:
    """A dense layer (out, in) whose weight may be stored transposed, and whether stock transformers converts it."""

    shape: tuple[int, int]
    transposed: bool = False
    stock: bool = True


@dataclass(frozen=True)
class Linears:
    """Dense layers by module name, sorted: what can be quantized, and why the others cannot."""

    candidates: Mapping[str, DenseLinear]
    heads: tuple[str, ...] = ()  # modules after the base model: heads and output embeddings
    kept: tuple[str, ...] = ()  # by the model's own wish (T5's `wo`), poolers, and the routers of experts
    shared: Mapping[str, str] = field(default_factory=dict)  # whose weight is another's too
    others: Mapping[str, str] = field(
        default_factory=dict
    )  # name to class: not called, or not computing, as `nn.Linear`


def find_linears(model: nn.Module) -> Linears:
    """Sort the dense layers of a model, which may be on the meta device."""
    heads = _heads(model)
    shared = _shared(model)
    float32 = kept_in_float32(model)
    mixtures = {name.rpartition(".")[0].rpartition(".")[0] for name in fused_experts(model)}
    # torch's own attention multiplies with its projection's weight, past the module.
    inlined = {
        f"{name}.out_proj" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    candidates: dict[str, DenseLinear] = {}
    kept: list[str] = []
    tied: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, module in model.named_modules():
        dense = _dense(module)
        if dense is None or _lies_in(name, heads):
            continue
        if not converted(name, float32) or "pooler" in name.split(".") or name.rpartition(".")[0] in mixtures:
            kept.append(name)
        elif name in shared:
            tied[name] = shared[name]
        elif name in inlined or not (dense.stock or computes_as_linear(type(module))):
            others[name] = type(module).__name__
        else:
            candidates[name] = dense
    return Linears(candidates, heads, tuple(kept), tied, others)


def _dense(module: nn.Module) -> DenseLinear | None:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        columns, rows = module.weight.shape
        return DenseLinear((rows, columns), transposed=True)
    if isinstance(module, nn.Linear):
        return DenseLinear((module.out_features, module.in_features), stock=type(module) is nn.Linear)
    return None


def computes_as_linear(kind: type[nn.Module]) -> bool:
    """Whether a subclass of `nn.Linear` computes x Wᵀ + b: by its code, or else by trying."""
    if kind.forward is nn.Linear.forward:
        return True
    try:
        with torch.device("cpu"), torch.no_grad():  # also where a model is being built on the meta device
            layer = cast(Any, kind)(3, 2).float()
            for parameter in layer.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) - 2.0)
            inputs = torch.tensor([[[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]]], dtype=torch.float32)
            found = layer(inputs)
        return torch.equal(found, nn.functional.linear(inputs, layer.weight, layer.bias))
    except Exception:  # whatever another constructor or forward wants, it is not `nn.Linear`'s
        return False


def bears_other_linears(model: nn.Module, targets: Iterable[str]) -> bool:
    """Whether transformers can set up a model where the targets' places are taken by modules with no `weight`, as
    gptqmodel's are: by trying. Some architectures begin the weights of their parts by name.
    """
    tried: Any = deepcopy(model)
    for name in targets:
        tried.set_submodule(name, nn.Module())
    try:
        for module in tried.modules():
            tried._init_weights(module)
    except AttributeError:
        return False
    return True


def _heads(model: nn.Module) -> tuple[str, ...]:
    """What comes after the base model, by module name: its siblings that have weights, and the output embeddings."""
    built = cast(Any, model)
    base = getattr(model, getattr(built, "base_model_prefix", "") or "", None)
    siblings = [
        name
        for name, child in model.named_children()
        if isinstance(base, nn.Module) and child is not base and any(True for _ in child.parameters())
    ]
    output = built.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [name for name, module in model.named_modules() if output is not None and module is output]
    return (*siblings, *(name for name in found if not _lies_in(name, siblings)))


def _lies_in(name: str, modules: Collection[str]) -> bool:
    """Whether a module is one of these, which are named in full, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _shared(model: nn.Module) -> dict[str, str]:
    """Modules whose weight another module has too, each with one of the others."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    groups = [group for group in names.values() if len(group) > 1]
    groups += [[copy, original] for copy, original in getattr(model, "all_tied_weights_keys", {}).items()]
    found: dict[str, str] = {}
    for group in groups:
        for name, other in zip(group, [*group[1:], group[0]], strict=True):
            if name.endswith(".weight") and other.endswith(".weight"):
                found.setdefault(name.removesuffix(".weight"), other.removesuffix(".weight"))
    return found


def select(model: nn.Module, linears: Linears, targets: Sequence[str] | None, excluded: Sequence[str]) -> list[str]:
    """The candidates that `targets` (default: all) reach and `excluded` do not, in the model's order.

    A pattern is a module's name, the end of one after a dot (`q_proj`), or either with `*` and `?`. OptionError
    for a pattern that reaches no candidate, and for one that reaches a weight shared with another module.
    """
    names = list(linears.candidates)
    for option, patterns in (("--target-modules", targets or ()), ("--exclude-modules", excluded)):
        for pattern in patterns:
            if option == "--exclude-modules" and any(reaches(pattern, name) for name, _ in model.named_modules()):
                continue  # what is not quantized anyway may be excluded too
            if not any(reaches(pattern, name) for name in names):
                raise OptionError(f"{option} {pattern!r} {_why_nothing(model, linears, pattern)}")
    for name, other in linears.shared.items():
        if any(reaches(pattern, name) for pattern in targets or ()):
            raise OptionError(
                f"--target-modules reaches {name!r}, which shares its weight with {other!r}: "
                "one weight cannot have two adapters; target others"
            )
    chosen = [name for name in names if targets is None or any(reaches(p, name) for p in targets)]
    chosen = [name for name in chosen if not any(reaches(p, name) for p in excluded)]
    if not chosen:
        raise OptionError("--exclude-modules leaves no linear layer to quantize: name fewer")
    return chosen


def _why_nothing(model: nn.Module, linears: Linears, pattern: str) -> str:
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linears.candidates}))
    for name, module in model.named_modules():
        if name and reaches(pattern, name) and any(True for _ in module.parameters(recurse=False)):
            if name in linears.shared:
                return f"reaches {name!r}, which shares its weight with {linears.shared[name]!r}: target others"
            if _lies_in(name, linears.heads) or name in linears.kept:
                return f"reaches {name!r}, which stays in 16 bits (linear layers that can be quantized: {known})"
            kind = type(module).__name__
            return f"reaches {name!r}, of class {kind}: only linear layers can be quantized (this model has: {known})"
    return f"matches no linear layer of this model (it has: {known})"


def reaches(pattern: str, name: str) -> bool:
    """Whether a pattern names a module."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def kept_in_float32(model: nn.Module) -> list[str]:
    """Patterns that transformers itself adds to those that it does not convert (T5's `wo`)."""
    return sorted(getattr(model, "_keep_in_fp32_modules", None) or ())


def converted(name: str, skipped: Sequence[str]) -> bool:
    """Whether stock transformers converts a module of this name beside such `llm_int8_skip_modules`."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return bool(should_convert_module(name, list(skipped)))


def skip_modules(model: nn.Module, linears: Linears, targets: Iterable[str]) -> list[str]:
    """What `llm_int8_skip_modules` must list so that transformers converts the targets and no more."""
    wanted = set(targets)
    rest = [name for name in linears.candidates if name not in wanted]
    skipped = [*linears.heads, *linears.kept, *linears.shared, *linears.others, *rest]
    everything = [*linears.candidates, *linears.kept, *linears.shared, *_dense_within(model, linears.heads)]
    found = {name for name in everything if converted(name, [*skipped, *kept_in_float32(model)])}
    if found != wanted:
        odd = sorted(wanted ^ found)[0]
        raise OptionError(
            f"transformers cannot tell {odd!r} from a module that stays in 16 bits, whose name it ends or begins with: "
            "exclude both or neither"
        )
    return skipped


def _dense_within(model: nn.Module, modules: Collection[str]) -> Iterator[str]:
    return (name for name, module in model.named_modules() if _lies_in(name, modules) and _dense(module))


def fused_experts(model: nn.Module) -> dict[str, int]:
    """Parameters of three and more sides, in which mixtures of experts keep their linears, with their sizes.

    bitsandbytes has no layer for them: they stay as they are.
    """
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "expert" in name.lower()
    }
