"""The full-precision model of a plan. It holds the weights of only one block at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from loftq.errors import SourceError
from loftq.models import linears, naming
from loftq.models.lockstep import find_blocks
from loftq.models.naming import NameMap
from loftq.models.tasks import build_meta, part_before_head
from loftq.planning.plan import Plan
from loftq.planning.recipe import layer_seed
from loftq.planning.weights import check_finite, digest_of


class BlockWeights:
    """A model whose blocks are on the meta device, except the one that is loaded. Weights outside blocks stay loaded.

    `core` is the part that is run: the whole model, or the part before the head of a task. It computes in `dtype`.
    `digests` holds the SHA-256 of each tensor that was read so far.
    """

    def __init__(self, plan: Plan, device: torch.device, *, trust_remote_code: bool = False) -> None:
        self.device = device
        self.dtype = computing_dtype(plan, device)
        self.digests: dict[str, str] = {}
        self._plan = plan
        self.model = _build(plan, self.dtype, trust_remote_code)
        self.core = part_before_head(self.model, plan.task)
        self.blocks = {
            name: self.model.get_submodule(name)
            for name in find_blocks(self.model, [layer.module for layer in plan.linears])
        }
        created = {key.rpartition(".")[0] for key in plan.created}
        self._names = naming.map_names(self.model, plan.source.checkpoint.tensors, new=created, resized=created)
        self._origins = _origins(self.model, self._names)
        start = "" if self.core is self.model else f"{cast(Any, self.model).base_model_prefix}."
        needed = [key for key in self.model.state_dict() if key.startswith(start)]
        meta = [key for key in needed if self._get(key).is_meta]  # buffers stay in memory
        self._keys = {name: [key for key in meta if key.startswith(f"{name}.")] for name in self.blocks}
        inside = {key for keys in self._keys.values() for key in keys}
        self._load_outside([key for key in needed if key not in inside])

    def load(self, block: str) -> None:
        """Read the weights of a block."""
        self._load(self._keys[block])

    def drop(self, block: str) -> None:
        """Free the memory of the weights of a block."""
        for key in self._keys[block]:
            self._set(key, self._get(key).to("meta"))

    def _load_outside(self, keys: Sequence[str]) -> None:
        """Load all weights outside blocks, and move the buffers that no checkpoint contains to the device."""
        self._load(keys)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def _load(self, keys: Sequence[str]) -> None:
        """Read weights. Tied weights are read once."""
        read: dict[str, torch.Tensor] = {}
        wanted = set(keys)
        for key, parts in self._names.fused.items():
            if key in wanted:
                tensors = ((name, pattern, self._read(name, key)) for name, pattern in parts)
                read |= naming.fuse(self._plan.model, key, tensors)
        for key in keys:
            origin = self._origins.get(key, key)
            if origin not in read:
                read[origin] = self._read(origin, key) if key in self._origins else self._initial(key)
            self._set(key, read[origin])

    def _read(self, name: str, key: str) -> torch.Tensor:
        """A tensor of the checkpoint, in the dtype in which the model computes with it."""
        stored = self._plan.source.checkpoint.read(name)
        if name not in self.digests:  # a block may be visited more than once
            self.digests[name] = digest_of(stored)
        if not stored.is_floating_point():
            return stored.to(self.device)
        check_finite(stored, name, self._plan.source)
        # Weights that transformers keeps in float32 in a float16 model would overflow in float16.
        keep_float32 = self.dtype == torch.float16 and set(key.split(".")) & set(linears.kept_in_float32(self.model))
        return stored.to(self.device, torch.float32 if keep_float32 else self.dtype)

    def _initial(self, key: str) -> torch.Tensor:
        """A value that no tensor provides: a buffer, or a parameter that the class of the model initializes."""
        value = self._get(key)
        if not value.is_meta:
            return value
        ignored = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        if key not in self._plan.created and not any(re.search(pattern, key) for pattern in ignored):
            raise SourceError(
                f"no tensor of {self._plan.source.name} is known to provide {key}: "
                "quantize this model without --calibration"
            )
        initial = naming.initial_tensor(self._plan.model, key, layer_seed(self._plan.recipe.seed, key))
        return initial.to(self.device, self.dtype)

    def _get(self, key: str) -> torch.Tensor:
        owner, _, name = key.rpartition(".")
        tensor: torch.Tensor = getattr(self.model.get_submodule(owner), name)
        return tensor

    def _set(self, key: str, tensor: torch.Tensor) -> None:
        owner, _, name = key.rpartition(".")
        module = self.model.get_submodule(owner)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[name] = tensor


def computing_dtype(plan: Plan, device: torch.device) -> torch.dtype:
    """The dtype in which the full-precision model runs: float32 on the CPU, where that is fastest, or the recipe's."""
    return torch.float32 if device.type == "cpu" else plan.recipe.dtype


def changed_tensors(plan: Plan, digests: Mapping[str, str]) -> Iterator[str]:
    """The names of tensors whose bytes no longer match `digests`. The quantized layers of the plan are not checked.

    Each tensor is read completely: embeddings, norms, a head, unquantized experts. That is exact, and takes as long as
    copying them to the output. Layers are checked when they are read to be solved (`Statistics.check_weights`).
    """
    checkpoint, layers = plan.source.checkpoint, {name for layer in plan.layers for name in layer.tensors}
    for name, digest in digests.items():
        if name not in layers and (name not in checkpoint.tensors or digest_of(checkpoint.read(name)) != digest):
            yield name


def _build(plan: Plan, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """The model with its buffers, but without weights, and without a cache of past tokens, which batches would fill."""
    model, _ = build_meta(
        plan.source.folder,
        task=plan.task.name,
        num_labels=plan.recipe.num_labels,
        trust_remote_code=trust_remote_code,
        buffers=True,
        dtype=dtype,
    )
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return model.eval()


def _origins(model: nn.Module, names: NameMap) -> dict[str, str]:
    """The checkpoint tensor of each weight, including tied weights."""
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    groups: dict[str, list[str]] = {}
    for key in model.state_dict():
        groups.setdefault(tied.get(key, key), []).append(key)
    origins = dict(names.source)
    for group in groups.values():
        sources = [names.source[key] for key in group if key in names.source]
        if sources:
            origins |= {key: sources[0] for key in group if key not in origins}
    return origins
