"""The factors of fused experts as peft keeps them (`target_parameters`, since peft 0.19).

For a parameter with E experts, each a matrix (out, in), and an adapter of rank r:

    lora_A.weight   (r · E, in)    expert by expert
    lora_B.weight   (out, r · E)   direction by direction, the expert changes fastest

peft wraps an experts module once for each of its parameters, the first one innermost. So the factors of `down_proj`
are named after the module, and those of `gate_up_proj` or `up_proj` after the `base_layer` within.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from loftq.formats.checkpoint import TensorSpec

if TYPE_CHECKING:
    import torch

_INNER = ".base_layer"
_LAST = "down_proj"


def path_of(parameter: str) -> str:
    """The module under whose name the factors of a parameter are saved, if all parameters of its module have some."""
    owner, _, last = parameter.rpartition(".")
    return owner if last == _LAST else f"{owner}{_INNER}"


def parameter_of(path: str, targets: Collection[str]) -> str | None:
    """The parameter whose factors are saved under a name. None if they are those of a linear.

    `targets` are the `target_parameters` of the adapter.
    """
    owner, depth = path, 0
    while owner.endswith(_INNER):
        owner, depth = owner.removesuffix(_INNER), depth + 1
    names = {target.rpartition(".")[2] for target in targets if _owns(owner, target)}
    ordered = sorted(names, key=lambda name: (name != _LAST, name))
    return f"{owner}.{ordered[depth]}" if depth < len(ordered) else None


def _owns(owner: str, target: str) -> bool:
    """Whether a module has the parameter that an entry of `target_parameters` names."""
    place = target.rpartition(".")[0]
    return not place or owner == place or owner.endswith(f".{place}")


def specs(a: str, b: str, shape: Sequence[int], rank: int) -> list[TensorSpec]:
    """The two tensors of a parameter of `shape` (experts, out, in), with these names."""
    import torch

    experts, rows, columns = shape
    return [
        TensorSpec(a, torch.float32, (rank * experts, columns)),
        TensorSpec(b, torch.float32, (rows, rank * experts)),
    ]


def joined(factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two tensors from A (r, in) and B (out, r) of each expert."""
    import torch

    b = torch.stack([b for _, b in factors], dim=-1)  # (out, r, experts)
    return torch.cat([a for a, _ in factors]), b.flatten(1)


def by_expert(a: torch.Tensor, b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `joined`: all A (experts, r, in) and all B (experts, out, r), as views."""
    return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)
