"""The distillation as a step of a run: it refines the adapter in the partial folder, then measures the errors again.

The factors of the solver are kept in a separate file until the distilled ones are in place and recorded in the journal,
so that a run that is interrupted in between repeats the step from the same start.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loftq.artifacts.manifest import heading
from loftq.artifacts.staging import Staging
from loftq.calibration.statistics import Statistics
from loftq.core import pooled
from loftq.core.metric import Metric, damped, squared
from loftq.errors import OptionError
from loftq.formats.adapter import FOLDER, WEIGHTS, Adapter, open_adapter
from loftq.formats.artifact import Artifact
from loftq.formats.checkpoint import Checkpoint, read_checkpoint
from loftq.formats.disk import replacing
from loftq.formats.scan import hash_of
from loftq.planning.plan import Layer, Plan
from loftq.planning.run import Run
from loftq.planning.weights import ExpertReader, read_source_weight

_START = "start.safetensors"


def reopen(staging: Staging) -> None:
    """Trust the record of an earlier distillation only if the adapter still has its bytes.

    Otherwise the factors of the solver take its place, where they are kept, and the step is done again.
    """
    name, start = f"{FOLDER}/{WEIGHTS}", staging.folder / _START
    weights = staging.folder / name
    if staging.distilled is not None and not staging.ready:
        recorded = staging.distilled.get("adapter_sha256")
        if recorded is not None and weights.is_file() and hash_of(weights) == recorded:
            staging.hashes[name] = recorded
            return
        staging.distilled = None
    if start.is_file() and not staging.ready:
        weights.parent.mkdir(exist_ok=True)
        start.replace(weights)


RefineFolder = Callable[[Path, Path], dict[str, Any]]  # refines a folder from a start, in another process


def distill(
    plan: Plan,
    staging: Staging,
    statistics: Statistics,
    run: Run,
    refine_elsewhere: RefineFolder | None = None,
) -> None:
    """Refine the adapter in the partial folder, unless that is done, and record the remaining error of each layer.

    It is refined in this process, unless `refine_elsewhere` does it.
    """
    start, name = staging.folder / _START, f"{FOLDER}/{WEIGHTS}"
    if staging.distilled is None:
        _copy(staging.folder / name, start)
        if refine_elsewhere is None:
            record = refine_folder(plan, staging.folder, start, statistics, run.device, quiet=run.quiet)
        else:
            record = refine_elsewhere(staging.folder, start)
        digest = hash_of(staging.folder / name)
        staging.note_distilled({**record, "adapter_sha256": digest})
        staging.hashes[name] = digest
    start.unlink(missing_ok=True)


def distilled(staging: Staging) -> dict[str, Any]:
    """The totals of a run that come from the distillation."""
    record = staging.distilled or {}
    return {key: record[key] for key in ("refine_steps", "divergence_before", "divergence") if key in record}


def distilled_row(staging: Staging, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a layer with the errors that remain after distillation."""
    errors: Mapping[str, Mapping[str, float]] = (staging.distilled or {}).get("errors", {})
    return {**row, **errors.get(row["name"], {})}


def refine_folder(
    plan: Plan, folder: Path, start: Path, statistics: Statistics, device: torch.device, *, quiet: bool
) -> dict[str, Any]:
    """Refine the adapter of a partial folder, whose factors are in the file `start`. Returns what was measured."""
    from loftq.solving.refine import refine  # imports transformers' trainer, which takes seconds

    artifact = Artifact(folder, heading(plan))
    refinement, factors = refine(
        artifact, statistics.teacher(), plan.recipe.refine, device, seed=plan.recipe.seed, quiet=quiet
    )
    record = {"refine_steps": refinement.steps, "divergence_before": refinement.before, "divergence": refinement.after}
    if not (math.isfinite(refinement.before) and math.isfinite(refinement.after)):
        raise OptionError("the distillation measures a divergence that is NaN or Inf: use --refine 0")
    if not factors:
        return record
    with replacing(folder / FOLDER / WEIGHTS) as scratch:
        save_file({**load_file(start), **factors}, scratch, {"format": "pt"})
    adapter, checkpoint = open_adapter(artifact.adapter), read_checkpoint(folder)
    return record | {
        "errors": {layer.module: _errors(plan, layer, adapter, checkpoint, statistics, device) for layer in plan.layers}
    }


def _errors(
    plan: Plan, layer: Layer, adapter: Adapter, checkpoint: Checkpoint, statistics: Statistics, device: torch.device
) -> dict[str, float]:
    """The relative errors of the weight and the outputs of a layer, with codes and factors read back from the files.

    Those of fused experts are only those of their weights.
    """
    if layer.experts:
        return {"error": _expert_error(plan, layer, adapter, checkpoint)}
    weight, _ = read_source_weight(plan, layer, device)
    codes, scales = plan.layout.read(layer.module, layer.shape, plan.grid(layer), checkpoint.read)
    backbone = plan.decoder(layer).decode(codes, scales, weight.shape).to(device)
    a, b = (factor.to(device) for factor in adapter.factors(layer.module))
    residual = weight - backbone - pooled.delta(a, b, adapter.scaling_of(layer.module), adapter.pool_size)
    errors = {"error": (squared(residual) / (squared(weight) or 1.0)) ** 0.5}
    moment = statistics.moment(layer.module)
    if moment is not None:
        outputs = Metric.of("full", damped(moment.to(device)))
        errors["output_error"] = outputs.norm(residual) / (outputs.norm(weight) or 1.0)
    if not all(map(math.isfinite, errors.values())):
        raise OptionError(
            f"the distillation of {layer.module} ended with an error that is NaN or Inf: use --refine 0, or "
            f"--exclude-modules {layer.module.rpartition('.')[2]}"
        )
    return errors


def _expert_error(plan: Plan, layer: Layer, adapter: Adapter, checkpoint: Checkpoint) -> float:
    """The relative error of the weights of fused experts, read one by one."""
    grid, quantizer, scaling = plan.grid(layer), plan.decoder(layer), adapter.scaling_of(layer.module)
    factors = list(zip(*adapter.expert_factors(layer.module), strict=True))
    norm = left = 0.0
    for index, weight in enumerate(ExpertReader(plan, layer)):
        read = partial(checkpoint.read_member, index=index)
        codes, scales = plan.layout.read(layer.module, layer.shape, grid, read)
        residual = weight - quantizer.decode(codes, scales, weight.shape)
        norm += squared(weight)
        left += squared(residual - pooled.delta(*factors[index], scaling, None))
    return float((left / (norm or 1.0)) ** 0.5)


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as scratch:
        shutil.copyfile(source, scratch)
