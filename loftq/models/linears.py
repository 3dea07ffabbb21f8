"""The linears of a model: which can be quantized, which are selected, and which stock transformers can load quantized.

All of this is read from the modules of the model itself. Stock transformers loads `nn.Linear` and `Conv1D` quantized,
but no subclass of `nn.Linear`. Our own plug-in can also load the subclasses that compute the same as `nn.Linear`.
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
from loftq.models.skipping import Skipped

_HEAD_NAMES = ("classifier", "score", "qa_outputs", "ctc_head")


@dataclass(frozen=True)
class DenseLinear:
    """A dense layer of `shape` (out, in).

    `transposed` says whether its weight is stored transposed, `stock` whether stock transformers can convert it.
    """

    shape: tuple[int, int]
    transposed: bool = False
    stock: bool = True


@dataclass(frozen=True)
class Linears:
    """Dense layers by module name: `candidates` can be quantized; the others cannot, sorted by the reason.

    `heads` are the modules after the base model: heads and output embeddings. `kept` stay in 16 bits: linears that the
    model itself excludes (T5's `wo`), poolers, and the routers of experts. `shared` maps modules to another module that
    has the same weight. `others` maps modules that are not called as `nn.Linear`, or do not compute the same, to their
    classes.
    """

    candidates: Mapping[str, DenseLinear]
    heads: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)


def find_linears(model: nn.Module) -> Linears:
    """Sort the dense layers of a model, which may be on the meta device."""
    heads = _heads(model)
    shared = _shared(model)
    float32 = kept_in_float32(model)
    mixtures = {name.rpartition(".")[0].rpartition(".")[0] for name in fused_experts(model)}
    # torch's own attention multiplies with the weight of its projection without calling the module.
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
    """Whether a subclass of `nn.Linear` computes x Wᵀ + b: either it inherits `forward`, or a trial shows it."""
    if kind.forward is nn.Linear.forward:
        return True
    try:
        with torch.device("cpu"), torch.no_grad():  # even while a model is being built on the meta device
            layer = cast(Any, kind)(3, 2).float()
            for parameter in layer.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) - 2.0)
            inputs = torch.tensor([[[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]]], dtype=torch.float32)
            outputs = layer(inputs)
        return torch.equal(outputs, nn.functional.linear(inputs, layer.weight, layer.bias))
    except Exception:  # a constructor or forward that needs other arguments is not that of `nn.Linear`
        return False


def bears_other_linears(model: nn.Module, targets: Iterable[str]) -> bool:
    """Whether transformers can initialize a model in which modules without `weight`, as gptqmodel's are, replace the
    targets. A trial shows it: some architectures initialize the weights of their modules by name.
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
    """Names of the modules after the base model: its siblings that have weights, and the output embeddings.

    In a model whose base model is not a module of its own, they are the modules with the name of a head.
    """
    built = cast(Any, model)
    base = getattr(model, getattr(built, "base_model_prefix", "") or "", None)
    siblings = [
        name
        for name, child in model.named_children()
        if (child is not base if isinstance(base, nn.Module) else name in _HEAD_NAMES)
        and any(True for _ in child.parameters())
    ]
    output = built.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outputs = [name for name, module in model.named_modules() if output is not None and module is output]
    return (*siblings, *(name for name in outputs if not _lies_in(name, siblings)))


def _lies_in(name: str, modules: Collection[str]) -> bool:
    """Whether a module is one of these, which are named in full, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _shared(model: nn.Module) -> dict[str, str]:
    """Modules that share their weight with other modules, each with the name of one of these."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    groups = [group for group in names.values() if len(group) > 1]
    groups += [[copy, original] for copy, original in getattr(model, "all_tied_weights_keys", {}).items()]
    shared: dict[str, str] = {}
    for group in groups:
        for name, other in zip(group, [*group[1:], group[0]], strict=True):
            if name.endswith(".weight") and other.endswith(".weight"):
                shared.setdefault(name.removesuffix(".weight"), other.removesuffix(".weight"))
    return shared


def select(
    model: nn.Module,
    linears: Linears,
    targets: Sequence[str] | None,
    excluded: Sequence[str],
    stacks: Collection[str] = (),
) -> list[str]:
    """The candidates that a pattern of `targets` (default: all) matches and none of `excluded` does, in model order.

    A pattern is the name of a module, the end of a name after a dot (`q_proj`), or either with `*` and `?`. Raises
    OptionError for a pattern that matches no candidate and none of `stacks`, the parameters of fused experts, and for
    one that matches a weight shared with another module.
    """
    names = list(linears.candidates)
    for option, patterns in (("--target-modules", targets or ()), ("--exclude-modules", excluded)):
        for pattern in patterns:
            if option == "--exclude-modules" and any(reaches(pattern, name) for name, _ in model.named_modules()):
                continue  # a module that would not be quantized anyway may be excluded too
            if not any(reaches(pattern, name) for name in names) and not reached_stacks(stacks, [pattern]):
                raise OptionError(f"{option} {pattern!r} {_why_nothing(model, linears, pattern)}")
    for name, other in linears.shared.items():
        if any(reaches(pattern, name) for pattern in targets or ()):
            raise OptionError(
                f"--target-modules matches {name!r}, which shares its weight with {other!r}: "
                "a weight cannot have two adapters; choose other modules"
            )
    chosen = [name for name in names if targets is None or any(reaches(p, name) for p in targets)]
    chosen = [name for name in chosen if not any(reaches(p, name) for p in excluded)]
    if not chosen and reached_stacks(stacks, targets or ()):
        raise OptionError("--target-modules names only fused experts: name at least one linear layer too")
    if not chosen:
        raise OptionError("--exclude-modules leaves no linear layer to quantize: exclude fewer modules")
    return chosen


def _why_nothing(model: nn.Module, linears: Linears, pattern: str) -> str:
    candidates = ", ".join(sorted({name.rpartition(".")[2] for name in linears.candidates}))
    for name, module in model.named_modules():
        if name and reaches(pattern, name) and any(True for _ in module.parameters(recurse=False)):
            if name in linears.shared:
                return f"matches {name!r}, which shares its weight with {linears.shared[name]!r}: choose other modules"
            if _lies_in(name, linears.heads) or name in linears.kept:
                return f"matches {name!r}, which stays in 16 bits (linear layers that can be quantized: {candidates})"
            return (
                f"matches {name!r}, of class {type(module).__name__}: only linear layers can be quantized "
                f"(this model has: {candidates})"
            )
    return f"matches no linear layer of this model (it has: {candidates})"


def reaches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the name of a module, or the end of it after a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def reached_stacks(stacks: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The parameters of fused experts that a pattern matches, by their own name or by that of their module."""
    owned = {stack: stack.rpartition(".")[0] for stack in stacks}
    return [s for s, owner in owned.items() if any(reaches(p, s) or reaches(p, owner) for p in patterns)]


def kept_in_float32(model: nn.Module) -> list[str]:
    """Patterns of the modules that transformers itself never converts (T5's `wo`)."""
    return sorted(getattr(model, "_keep_in_fp32_modules", None) or ())


def converted(name: str, skipped: Sequence[str]) -> bool:
    """Whether stock transformers converts a module of this name if `llm_int8_skip_modules` is `skipped`."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return bool(should_convert_module(name, list(skipped)))


def skip_modules(model: nn.Module, linears: Linears, targets: Iterable[str]) -> list[str]:
    """The list of `llm_int8_skip_modules` with which transformers converts exactly the targets.

    Raises OptionError if there is no such list, because transformers matches parts of names.
    """
    wanted = set(targets)
    rest = [name for name in linears.candidates if name not in wanted]
    skipped = [*linears.heads, *linears.kept, *linears.shared, *linears.others, *rest]
    everything = [*linears.candidates, *linears.kept, *linears.shared, *_dense_within(model, linears.heads)]
    patterns = Skipped([*skipped, *kept_in_float32(model)])
    quantized = {name for name in everything if not patterns.holds(name)}
    if quantized != wanted:
        odd = sorted(wanted ^ quantized)[0]
        raise OptionError(
            f"transformers cannot distinguish {odd!r} from a module that stays in 16 bits, since one name begins or "
            "ends with the other: exclude both or neither"
        )
    return skipped


def _dense_within(model: nn.Module, modules: Collection[str]) -> Iterator[str]:
    return (name for name, module in model.named_modules() if _lies_in(name, modules) and _dense(module))


def fused_experts(model: nn.Module) -> dict[str, int]:
    """Three-dimensional parameters in which mixtures of experts hold all their linears, with their numbers of weights.

    bitsandbytes has no layer for them, so they are not quantized.
    """
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "expert" in name.lower()
    }
