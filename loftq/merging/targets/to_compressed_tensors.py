"""`loftq merge --to compressed-tensors`: any backbone and adapter in integers of groups, for vLLM and SGLang."""

from __future__ import annotations

import importlib.util
import re
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from loftq.calibration.statistics import Statistics
from loftq.core.affine import AffineQuantizer
from loftq.core.grid import Grid
from loftq.core.solvers.rounded import round_weight
from loftq.errors import OptionError, UnknownNameError
from loftq.formats import compressed_tensors
from loftq.formats.checkpoint import Checkpoint, TensorSpec
from loftq.merging.calibration import TEXT, check_calibration, gather_statistics
from loftq.merging.model_folder import ModelFolder
from loftq.models.linears import find_linears, fused_experts
from loftq.models.tasks import TASKS, auto_class, build_meta
from loftq.planning.run import start
from loftq.planning.settings import RunSettings


class CompressedTensors(ModelFolder):
    """A folder in the layout pack-quantized, whose weights are backbone plus adapter, rounded anew."""

    name = "compressed-tensors"
    format = compressed_tensors.METHOD
    any_backbone = True
    comparable = True
    tolerance = 5e-4
    rounds = True
    uses = ("bits", "group_size", "zero_point", *TEXT, "device")

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
            raise OptionError(f"--to compressed-tensors has no place for fused experts ({stack}): use --to bf16")
        for module, (rows, columns) in self.pair.backbone.shapes.items():
            if columns % self._group_size:
                raise OptionError(
                    f"--to compressed-tensors: groups of {self._group_size} do not divide the {columns} inputs of "
                    f"{module}: use --group-size 32, or --to bf16 if that does not divide them either"
                )
            if rows * self.grid(module).bits % compressed_tensors.WORD and self.settings.zero_point == "integer":
                raise OptionError(
                    f"--to compressed-tensors: the zero-points of the {rows} outputs of {module} do not fill whole "
                    "words: use --zero-point symmetric"
                )
        others = [name for name, dense in self._linears.candidates.items() if dense.transposed]
        if others:
            raise OptionError(
                f"--to compressed-tensors holds only nn.Linear, and {others[0]} is a Conv1D: use --to bf16"
            )

    def notes(self) -> tuple[str, ...]:
        """Notes for the user."""
        exact = "compressed-tensors has whole zero-points, so a QA-LoRA is rounded too; --to int and mlx are exact"
        return (*super().notes(), *((exact,) if self.pair.adapter.pool_size is not None else ()))

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the bytes of the result depend on, the statistics too."""
        statistics = self._statistics
        record = {} if statistics is None else {"settings": statistics.settings, "sha256": statistics.record["sha256"]}
        return {**super().fingerprint(), "statistics": record, "device": self._device.type}

    def grid(self, module: str) -> Grid:  # noqa: ARG002
        """The type of all linears."""
        zero_point = self.settings.zero_point or "symmetric"
        return Grid(f"int{self.settings.bits or 4}", self._group_size, zero_point=zero_point)

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one linear."""
        return compressed_tensors.specs(module, self.pair.backbone.shapes[module], self.grid(module), self._dtype)

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        shape, grid = self.pair.backbone.shapes[module], self.grid(module)
        quantizer = cast(AffineQuantizer, grid.quantizer(shape[1], self._dtype))
        weight = self.pair.merged(module).contiguous().to(self._device)
        moment = None if self._statistics is None else self._statistics.moment(module)
        codes, scales = round_weight(weight, quantizer, moment)
        return compressed_tensors.tensors(module, shape, grid, self._dtype, codes, scales)

    def rounded(self, module: str, written: Checkpoint, weight: torch.Tensor) -> torch.Tensor:
        """The sum, changed by the difference of the written weight from the sum that was rounded."""
        shape, grid = self.pair.backbone.shapes[module], self.grid(module)
        stored = compressed_tensors.dense(module, shape, grid, written.read).float()
        return weight + (stored - self.pair.merged(module))

    def load(self, folder: Path) -> Any:
        """The model with dense weights: transformers 5 cannot load zero-points that stay compressed."""
        from transformers import CompressedTensorsConfig

        with warnings.catch_warnings():  # about the options that are added to those of the folder
            warnings.simplefilter("ignore", UserWarning)
            loader = auto_class(TASKS[self.pair.backbone.task])
            return loader.from_pretrained(
                folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
            )

    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        ignored = [
            name
            for name, module in self._model.named_modules()
            if isinstance(module, nn.Linear) and name not in self.pair.backbone.grids
        ]
        experts = {name.rpartition(".")[0] for name in fused_experts(self._model)}
        ignored += [f"re:{re.escape(name)}.*" for name in sorted(experts)]
        grid = self.grid("")
        config = {**self.pair.config, "quantization_config": compressed_tensors.quantization_config(grid, ignored)}
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(self._dtype).removeprefix("torch.")
        return config

    @cached_property
    def _group_size(self) -> int:
        """The group size of the settings, or the largest that divides the inputs of all linears."""
        sizes = compressed_tensors.GROUP_SIZES
        if self.settings.group_size is not None:
            if self.settings.group_size not in sizes:
                raise OptionError(
                    f"--group-size {self.settings.group_size}: --to compressed-tensors holds groups of "
                    f"{', '.join(map(str, sizes))} inputs, which servers can read"
                )
            return self.settings.group_size
        shapes = self.pair.backbone.shapes.values()
        return next((size for size in sizes if all(columns % size == 0 for _, columns in shapes)), sizes[-1])

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
    def _statistics(self) -> Statistics | None:
        return gather_statistics(self.pair, self._group_size, self.settings, self.run)

    @cached_property
    def _device(self) -> torch.device:
        return start(RunSettings(device=self.settings.device)).device
