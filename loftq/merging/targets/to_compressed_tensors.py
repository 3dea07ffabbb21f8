"""`loftq merge --to compressed-tensors`: any backbone and adapter in integers of groups, for vLLM and SGLang."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from loftq.core.affine import AffineQuantizer
from loftq.core.grid import Grid
from loftq.core.solvers.rounded import round_weight
from loftq.errors import OptionError, UnknownNameError
from loftq.formats import compressed_tensors
from loftq.formats.checkpoint import Checkpoint, TensorSpec, read_checkpoint
from loftq.formats.given_compressed import compressed_view
from loftq.formats.shard_writer import ShardWriter
from loftq.merging.calibration import check_calibration
from loftq.merging.checkpoint_names import CheckpointNames, at_expert
from loftq.merging.rounded_weights import RoundedWeights
from loftq.models.linears import find_linears, fused_experts
from loftq.models.tasks import TASKS, auto_class, build_meta


class CompressedTensors(RoundedWeights):
    """A folder in the layout pack-quantized, whose weights are backbone plus adapter, rounded anew."""

    name = "compressed-tensors"
    format = compressed_tensors.METHOD
    group_sizes = compressed_tensors.GROUP_SIZES

    def check(self) -> None:
        """Return None. Raises OptionError for settings that the layout lacks, and for linears that it cannot hold."""
        settings = self.settings
        if settings.bits not in (None, *compressed_tensors.BITS):
            raise OptionError(f"--bits {settings.bits}: --to compressed-tensors holds 4 or 8, which servers can read")
        if settings.zero_point not in (None, *compressed_tensors.ZERO_POINTS):
            raise UnknownNameError(
                "zero-point of --to compressed-tensors", str(settings.zero_point), compressed_tensors.ZERO_POINTS
            )
        check_calibration(settings)
        if self.run.check and importlib.util.find_spec("compressed_tensors") is None:
            raise OptionError(
                "--to compressed-tensors needs the package of this name to compare logits: "
                "pip install compressed-tensors, or add --no-check"
            )
        self._check_linears()

    def _check_linears(self) -> None:
        """Raise OptionError for weights that the layout cannot hold."""
        for stack in self.pair.backbone.stacks:
            if any(tensor.ndim != 2 for tensor in self._first_expert(stack).values()):
                raise OptionError(
                    f"--to compressed-tensors needs a tensor for each expert, and checkpoints of this family have one "
                    f"for all of them ({stack}): use --to bf16"
                )
        for module, rows, columns in self._matrices():
            if columns % self.group_size:
                raise OptionError(
                    f"--to compressed-tensors: groups of {self.group_size} do not divide the {columns} inputs of "
                    f"{module}: use --group-size 32, or --to bf16 if that does not divide them either"
                )
            if rows * self._grid.bits % compressed_tensors.WORD and self.settings.zero_point == "integer":
                raise OptionError(
                    f"--to compressed-tensors: the zero-points of the {rows} outputs of {module} do not fill whole "
                    "words: use --zero-point symmetric"
                )
        others = [name for name, dense in self._linears.candidates.items() if dense.transposed]
        if others:
            raise OptionError(
                f"--to compressed-tensors holds only nn.Linear, and {others[0]} is a Conv1D: use --to bf16"
            )

    def _matrices(self) -> Iterator[tuple[str, int, int]]:
        """The sides (out, in) of every weight that is rounded, with its module. Those of all experts are alike."""
        stacks = self.pair.backbone.stacks
        for module, shape in self.pair.backbone.shapes.items():
            tensors = self._first_expert(module).values() if module in stacks else ()
            for rows, columns in [tuple(tensor.shape) for tensor in tensors] or [shape]:
                yield module, rows, columns

    def _first_expert(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors of the first of fused experts, on the meta device, by their names in checkpoints."""
        return self._names.of_expert(module, torch.empty(self.pair.backbone.shapes[module][1:], device="meta"))

    def notes(self) -> tuple[str, ...]:
        """Notes for the user."""
        exact = "compressed-tensors has whole zero-points, so a QA-LoRA is rounded too; --to int and mlx are exact"
        return (*super().notes(), *((exact,) if self.pair.adapter.pool_size is not None else ()))

    def name_of(self, name: str) -> str:
        """The name of a tensor in checkpoints of the model."""
        return self._names.of(name)

    def grid(self, module: str) -> Grid:  # noqa: ARG002
        """The type of all linears."""
        return self._grid

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one linear, or of fused experts."""
        backbone, grid = self.pair.backbone, self._grid
        if module not in backbone.stacks:
            name = self._names.of_linear(module)
            return compressed_tensors.specs(name, backbone.shapes[module], grid, self._dtype)
        first = self._first_expert(module)
        linears = [
            (at_expert(_linear(name), expert), tensor.shape)
            for expert in range(backbone.stacks[module])
            for name, tensor in first.items()
        ]
        return [spec for name, shape in linears for spec in compressed_tensors.specs(name, shape, grid, self._dtype)]

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        moment = None if self.inputs is None else self.inputs.moment(module)
        return self._rounded_tensors(self._names.of_linear(module), self.pair.merged(module).contiguous(), moment)

    def write_module(self, module: str, writer: ShardWriter) -> dict[str, str]:
        """Write the tensors of one linear, or of fused experts, one expert at a time."""
        if module not in self.pair.backbone.stacks:
            return super().write_module(module, writer)
        moments = repeat(None) if self.inputs is None else self.inputs.expert_moments(module, self.device)
        hashes: dict[str, str] = {}
        for expert, (weight, moment) in enumerate(zip(self.pair.merged_experts(module), moments, strict=False)):
            for name, matrix in self._names.of_expert(module, weight, expert).items():
                tensors = self._rounded_tensors(_linear(name), matrix.contiguous(), moment)
                hashes |= {key: writer.write(key, tensor) for key, tensor in tensors.items()}
        return hashes

    def _rounded_tensors(self, name: str, weight: torch.Tensor, moment: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The tensors of one weight (out, in), under the name of its linear in the checkpoint."""
        quantizer = cast(AffineQuantizer, self._grid.quantizer(weight.shape[1], self._dtype))
        codes, scales = round_weight(weight.to(self.device), quantizer, moment)
        return compressed_tensors.tensors(name, weight.shape, self._grid, self._dtype, codes, scales)

    def rounded(self, module: str, written: Checkpoint, weight: torch.Tensor) -> torch.Tensor:
        """The sum, changed by the difference of the written weight from the sum that was rounded."""
        names = self._names
        if module not in self.pair.backbone.stacks:
            return weight + (self._stored(names.of_linear(module), written, weight.shape) - self.pair.merged(module))
        changes = []
        for expert, merged in enumerate(self.pair.merged_experts(module)):
            parts = names.of_expert(module, merged, expert)
            stored = {name: self._stored(_linear(name), written, part.shape) for name, part in parts.items()}
            changes.append(names.expert_of(module, stored, merged.shape) - merged)
        return weight + torch.stack(changes)

    def _stored(self, name: str, written: Checkpoint, shape: Sequence[int]) -> torch.Tensor:
        """A written weight (out, in), by the name of its linear in the checkpoint."""
        return compressed_tensors.dense(name, shape, self._grid, written.read).float()

    def load(self, folder: Path) -> Any:
        """The model with dense weights: transformers 5 cannot load zero-points that stay compressed.

        It cannot load most families of mixtures in this format either: our own reader decompresses them.
        """
        from transformers import AutoConfig, CompressedTensorsConfig

        if fused_experts(self._model):
            config = AutoConfig.from_pretrained(folder)
            view = compressed_view(read_checkpoint(folder), config.quantization_config, torch.float32)
            del config.quantization_config
            state = {name: view.read(name) for name in view.tensors}
            model_class: Any = type(self._model)
            return model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
        with warnings.catch_warnings():  # about the options that are added to those of the folder
            warnings.simplefilter("ignore", UserWarning)
            return auto_class(TASKS[self.pair.backbone.task]).from_pretrained(
                folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
            )

    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        stacks = {name.rpartition(".")[0] for name in self.pair.backbone.stacks}
        experts = {name.rpartition(".")[0] for name in fused_experts(self._model)} - stacks
        ignored = [self._names.of_linear(name) for name in self._dense_modules()]
        ignored += [f"re:{re.escape(name)}.*" for name in sorted(experts)]
        grid = self._grid
        config = {**self.pair.config, "quantization_config": compressed_tensors.quantization_config(grid, ignored)}
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(self._dtype).removeprefix("torch.")
        return config

    def _dense_modules(self) -> list[str]:
        """The modules with a dense matrix that a server may take for a linear, routers too."""
        return [
            name
            for name, module in self._model.named_modules()
            if name not in self.pair.backbone.grids
            and (isinstance(module, nn.Linear) or (self.pair.backbone.stacks and _is_router(module)))
        ]

    @cached_property
    def _grid(self) -> Grid:
        """The type of all weights that are rounded."""
        zero_point = self.settings.zero_point or "symmetric"
        return Grid(f"int{self.settings.bits or 4}", self.group_size, zero_point=zero_point)

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of scales, in which servers compute."""
        return torch.float16 if self.pair.backbone.dtype == torch.float16 else torch.bfloat16

    @cached_property
    def _model(self) -> Any:
        return build_meta(self.pair.backbone.folder, task=self.pair.backbone.task)[0]

    @cached_property
    def _linears(self) -> Any:
        return find_linears(self._model)

    @cached_property
    def _names(self) -> CheckpointNames:
        return CheckpointNames(self._model, mixture=bool(self.pair.backbone.stacks))


def _linear(tensor: str) -> str:
    """The name of the linear that a weight of a checkpoint belongs to."""
    return tensor.rpartition(".")[0]


def _is_router(module: nn.Module) -> bool:
    """Whether a module has a matrix as its weight, but is no embedding."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding)
