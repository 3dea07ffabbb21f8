"""The statistics with which a target rounds the weights of a merged model: those of the model that it was made from.

They are the same that `loftq quantize --calibration` gathers, so a folder that it left beside its output is used again.
"""

from __future__ import annotations

from pathlib import Path

from loftq.artifacts.backbone import Backbone
from loftq.artifacts.pair import BackboneAndAdapter
from loftq.calibration.gather import calibrate
from loftq.calibration.statistics import Statistics
from loftq.errors import ArtifactError, OptionError
from loftq.hub.source import Source, find_recorded
from loftq.hub.text import find_text
from loftq.merging.settings import MergeRun, MergeSettings
from loftq.planning.planner import make_plan
from loftq.planning.recipe import resolve
from loftq.planning.run import start
from loftq.planning.settings import QuantizeSettings, RunSettings
from loftq.settings import option_name

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


def gather_statistics(
    pair: BackboneAndAdapter, group_size: int, settings: MergeSettings, run: MergeRun
) -> Statistics | None:
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
    return calibrate(plan, Path(run.output), statistics_run)


def _find_source(backbone: Backbone, settings: MergeSettings) -> Source:
    if settings.source is not None:
        return find_recorded(settings.source)
    if backbone.artifact is None:
        raise OptionError(
            f"{backbone.folder} does not say from which model it was made, which is calibrated: name it with --source"
        )
    recorded = backbone.artifact.manifest["source"]
    return find_recorded(str(recorded["model"]), recorded["revision"])
