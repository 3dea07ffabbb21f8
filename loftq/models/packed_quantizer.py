"""Base class of our quantizers for transformers, which replace the linears of a model by packed ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from loftq.core.grid import Grid
from loftq.errors import ArtifactError
from loftq.formats.checkpoint import TensorSpec, read_header
from loftq.formats.native import METHOD
from loftq.models.devices import find_gpu
from loftq.models.expert_stacks import find_stacks
from loftq.models.linears import DenseLinear, find_linears, kept_in_float32
from loftq.models.missing_adapter import AdapterCheck
from loftq.models.packed_experts import PackedExperts, pack_stacks
from loftq.models.packed_linear import PackedLinear
from loftq.models.skipping import Skipped


class PackedQuantizer(HfQuantizer):
    """Replaces linears of a model by packed linears before the weights are loaded."""

    requires_calibration = False
    _linear: type[PackedLinear] = PackedLinear

    @abstractmethod
    def _grids(self, candidates: dict[str, DenseLinear], names: set[str], model: Any) -> Iterator[tuple[str, Grid]]:
        """The linears to replace, with the types of their weights. `names` are those of the checkpoint's tensors."""

    def _stacks(self, model: Any) -> dict[str, tuple[Grid, tuple[int, int, int]]]:
        """The parameters of fused experts to pack, with the types of their weights and their shapes."""
        config: Any = self.quantization_config
        ends = tuple(f".{end}" for end in getattr(config, "experts", ()))
        found = find_stacks(model).candidates if ends else {}
        return {name: (config.grid(name), s.shape) for name, s in found.items() if f".{name}".endswith(ends)}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        candidates = dict(find_linears(model).candidates)
        files = [Path(file) for file in (checkpoint_files or () if self.pre_quantized else ())]
        headers = {file: read_header(file) for file in files}
        names = {spec.name for specs in headers.values() for spec in specs}
        for name, grid in self._grids(candidates, names, model):
            rows, columns = candidates[name].shape
            old = model.get_submodule(name)
            packed = self._linear(columns, rows, old.bias is not None, grid=grid, dtype=old.weight.dtype, device="meta")
            model.set_submodule(name, packed)
        pack_stacks(model, self._stacks(model), "meta")
        for file, specs in headers.items():
            _check_sizes(model, file, specs)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.quantization_method = METHOD  # for every layout, because peft refuses to merge if this is "gptq"
        if getattr(self.quantization_config, "needs_adapter", False):
            model.register_forward_pre_hook(AdapterCheck())
        return model

    def update_device_map(self, device_map: Any) -> Any:
        """Put the model on the GPU if there is no device map, as transformers does for bitsandbytes."""
        gpu = find_gpu()
        return device_map if gpu is None or device_map is not None else {"": gpu}

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` writes the tensors as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters on the model can be trained."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, cast(nn.Module, module.to_dense(dtype)))
            elif isinstance(module, PackedExperts):
                module.to_dense(dtype)
        return model


def unskipped(candidates: dict[str, DenseLinear], config: Any, model: Any) -> Iterator[tuple[str, Grid]]:
    """The linears that a configuration of ours does not skip, with the types of their weights."""
    skipped = Skipped([*config.skip_modules, *kept_in_float32(model)])
    return ((name, config.grid(name)) for name in candidates if not skipped.holds(name))


def _check_sizes(model: nn.Module, file: Path, specs: Sequence[TensorSpec]) -> None:
    """Raise ArtifactError if a packed tensor does not have the dtype and shape that config.json implies.

    transformers would only report a mismatch, without the cause.
    """
    expected = {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, (PackedLinear, PackedExperts))
        for key, tensor in module.state_dict().items()
        if not key.endswith("bias")
    }
    for spec in specs:
        wanted = expected.get(spec.name)
        if wanted is not None and (spec.shape, spec.dtype) != (tuple(wanted.shape), wanted.dtype):
            raise ArtifactError(
                f"{file}: {spec.name} is {spec.dtype} {list(spec.shape)}, expected {wanted.dtype} "
                f"{list(wanted.shape)}: the folder is damaged, or its config.json belongs to another model"
            )
