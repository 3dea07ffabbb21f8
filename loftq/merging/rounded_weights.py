"""Targets whose weights are backbone plus adapter, rounded anew to integers in groups, with or without text."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch

from loftq.errors import OptionError
from loftq.merging.calibration import TEXT, LayerInputs, gather_inputs
from loftq.merging.model_folder import ModelFolder
from loftq.planning.run import start
from loftq.planning.settings import RunSettings


class RoundedWeights(ModelFolder):
    """A folder of integers. The codes are chosen for the merged weights, by the inputs of layers if there is text."""

    group_sizes: ClassVar[tuple[int, ...]]  # that the format holds, the first that fits is the default
    any_backbone = True
    comparable = True
    tolerance = 5e-4
    rounds = True
    uses = ("bits", "group_size", "zero_point", *TEXT, "device")

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the bytes of the result depend on, the statistics too."""
        statistics = {} if self.inputs is None else self.inputs.fingerprint()
        return {**super().fingerprint(), "statistics": statistics, "device": self.device.type}

    @cached_property
    def group_size(self) -> int:
        """The group size of the settings, or the first that divides the inputs of all linears."""
        sizes = self.group_sizes
        if self.settings.group_size is not None:
            if self.settings.group_size not in sizes:
                raise OptionError(
                    f"--group-size {self.settings.group_size}: --to {self.name} holds groups of "
                    f"{', '.join(map(str, sizes))} inputs, which servers can read"
                )
            return self.settings.group_size
        shapes = self.pair.backbone.shapes.values()
        return next((size for size in sizes if all(shape[-1] % size == 0 for shape in shapes)), sizes[-1])

    @cached_property
    def inputs(self) -> LayerInputs | None:
        """The statistics of the inputs of all linears; None without a text."""
        return gather_inputs(self.pair, self.group_size, self.settings, self.run)

    @cached_property
    def device(self) -> torch.device:
        """The device that rounds."""
        return start(RunSettings(device=self.settings.device)).device
