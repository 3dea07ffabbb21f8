"""The inputs by which a target rounds the weights of a merged model: those of the model that it was made from.

They are the same that `loftq quantize --calibration` gathers, so a folder that it left beside its output is used again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq.artifacts.backbone import Backbone
from loftq.artifacts.pair import BackboneAndAdapter
from loftq.calibration.gather import calibrate
from loftq.calibration.statistics import Statistics
from loftq.errors import ArtifactError, OptionError
from loftq.hub.source import Source, find_recorded
from loftq.hub.text import find_text
from loftq.merging.settings import MergeRun, MergeSettings
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import resolve
from loftq.planning.run import start
from loftq.planning.settings import QuantizeSettings, RunSettings
from loftq.settings import option_name
from loftq.solving.expert_inputs import expert_inputs

TEXT = ("source", "calibration", "calibration_tokens", "sequence_length", "statistics")  # settings of a target


def check_calibration(settings: MergeSettings) -> None:
    """Raise OptionError for a text that does not exist, and for settings that need a text."""
    if settings.calibration is not None:
        find_text(settings.calibration)
        return
    for name in TEXT:
        value = getattr(settings, name)
        if value is not None:
            raise OptionError(
                f"{option_name(name)} {value}: needs text: add --calibration FILE, or --calibration default"
            )


@dataclass(frozen=True)
class LayerInputs:
    """The statistics of the inputs of all linears and experts, and the plan of the model that was run."""

    plan: Plan
    statistics: Statistics

    def moment(self, module: str) -> torch.Tensor | None:
        """The moment H (in, in) of the inputs of a linear; None if the text never reached it."""
        return self.statistics.moment(module)

    def expert_moments(self, module: str, device: torch.device) -> Iterator[torch.Tensor | None]:
        """The same of each expert of a parameter, in turn."""
        layer = next(layer for layer in self.plan.stacks if layer.module == module)
        inputs = expert_inputs(self.plan, layer, self.statistics, device)
        for expert in range(layer.experts):
            yield None if inputs is None else inputs.moment(expert)

    def fingerprint(self) -> dict[str, Any]:
        """Everything about them that the bytes of a result depend on."""
        return {"settings": self.statistics.settings, "sha256": self.statistics.record["sha256"]}


def gather_inputs(
    pair: BackboneAndAdapter, group_size: int, settings: MergeSettings, run: MergeRun
) -> LayerInputs | None:
    """The statistics of the inputs of all linears, gathered now or before; None without a text.

    Raises OptionError if the full-precision model is unknown, and ArtifactError if its linears are not those of the
    backbone.
    """
    if settings.calibration is None:
        return None
    backbone = pair.backbone
    recipe = resolve(
        QuantizeSettings(
            quant_type="int",
            group_size=group_size,
            rank=1,
            format="loftq",
            task=backbone.task,
            num_labels=backbone.artifact.manifest["recipe"].get("num_labels") if backbone.artifact else None,
            target_modules=tuple(backbone.grids),
            calibration=settings.calibration,
            calibration_tokens=settings.calibration_tokens,
            sequence_length=settings.sequence_length,
        )
    )
    plan = make_plan(_find_source(backbone, settings), recipe)
    for layer in plan.layers:
        if layer.shape != backbone.shapes[layer.module]:
            raise ArtifactError(
                f"{layer.module} is {layer.shape} in {plan.source.name}, but {backbone.shapes[layer.module]} in "
                f"{backbone.folder}: name the model that it was made from with --source"
            )
    statistics_run = start(RunSettings(device=settings.device, statistics=settings.statistics, quiet=run.quiet))
    statistics = calibrate(plan, Path(run.output), statistics_run)
    return None if statistics is None else LayerInputs(plan, statistics)


def _find_source(backbone: Backbone, settings: MergeSettings) -> Source:
    if settings.source is not None:
        return find_recorded(settings.source)
    if backbone.artifact is None:
        raise OptionError(
            f"{backbone.folder} does not say from which model it was made, which is calibrated: name it with --source"
        )
    recorded = backbone.artifact.manifest["source"]
    return find_recorded(str(recorded["model"]), recorded["revision"])
