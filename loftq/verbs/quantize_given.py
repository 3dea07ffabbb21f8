"""`loftq quantize --backbone`: an adapter for a model that is quantized already, layer by layer."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from loftq.artifacts.given_card import (
    KIND,
    totals_of_adapter,
    write_adapter_config,
    write_adapter_manifest,
)
from loftq.artifacts.staging import is_begun, open_staging
from loftq.calibration.gather import calibrate
from loftq.calibration.statistics import Statistics
from loftq.errors import OutputError
from loftq.formats import artifact
from loftq.formats.disk import explain_os_errors
from loftq.formats.space import check_space
from loftq.hub.source import Source
from loftq.planning.given_backbone import (
    GivenBackbone,
    base_name,
    find_backbone,
    plan_adapter,
    recorded_settings,
)
from loftq.planning.plan import Plan
from loftq.planning.recipe import Recipe
from loftq.planning.run import Run
from loftq.settings import plain
from loftq.solving.finished import ANOTHER, check_files, check_source, check_unchanged, fingerprint_of
from loftq.solving.given import AdapterReport, AdapterSolver
from loftq.solving.layers import solve_all
from loftq.solving.memory import needed
from loftq.solving.report import peak_memory, planned_statistics


def quantize_given(
    source: Source, recipe: Recipe, folder: Path, run: Run, *, given: str, dry_run: bool = False
) -> AdapterReport:
    """Write the adapter of `source` for the backbone `given` into a folder. With `dry_run` nothing is written.

    Raises LoftQError.
    """
    started = time.perf_counter()
    found = find_backbone(given, source, run.token, trust_remote_code=run.trust_remote_code, headers_only=dry_run)
    plan, backbone = plan_adapter(source, found, recipe, trust_remote_code=run.trust_remote_code)
    if dry_run:
        parts = needed(plan, run.workers, run.device)
        report = _report(plan, backbone, folder, [], max(parts.values()), None)
        return replace(report, parts=parts, statistics=planned_statistics(plan))
    if run.resume and not is_begun(folder) and (folder / artifact.MANIFEST).is_file():
        rows = _finished(plan, backbone, folder)
    else:
        plan, rows = _make(plan, backbone, folder, run, given)
    return _report(plan, backbone, folder, rows, peak_memory(run.device), time.perf_counter() - started)


def _make(plan: Plan, backbone: GivenBackbone, folder: Path, run: Run, given: str) -> tuple[Plan, list[dict[str, Any]]]:
    """Write the folder, or the missing part of it."""
    AdapterSolver(plan, backbone, None, run.device).check_first()
    with explain_os_errors(folder):
        check_space(folder, plan.adapter.nbytes)
    statistics: Statistics | None = calibrate(plan, folder, run)
    if statistics is not None:
        plan = replace(plan, notes=(*plan.notes, *statistics.notes))
    base, revision = base_name(backbone.source, given)
    fingerprint = {
        **fingerprint_of(plan, statistics, run.device, run.trust_remote_code),
        "backbone": {"name": base, "revision": backbone.revision, "files": backbone.source.file_states()},
    }
    with open_staging(folder, fingerprint, overwrite=run.overwrite) as staging:
        if not staging.ready:
            solve_all(plan, staging, statistics, run, AdapterSolver(plan, backbone, statistics, run.device))
            write_adapter_config(plan, staging, base, revision)
            check_source(plan, fingerprint, run.trust_remote_code)
            given_source, advice = backbone.source, "start again with --overwrite"
            check_unchanged(given_source.folder, fingerprint["backbone"]["files"], given_source.file_states, advice)
            rows = [staging.done[layer.tensor]["row"] for layer in plan.layers]
            write_adapter_manifest(plan, backbone, staging, rows, base, statistics.settings if statistics else None)
        rows = [staging.done[layer.tensor]["row"] for layer in plan.layers]
        staging.publish()
    return plan, rows


def _finished(plan: Plan, backbone: GivenBackbone, folder: Path) -> list[dict[str, Any]]:
    """The rows of a complete folder. Raises OutputError if it is the result of another run."""
    finished = artifact.open_artifact(folder)
    manifest = finished.manifest
    if manifest["kind"] != KIND:
        raise OutputError(f"{folder} is finished, but it is a {manifest['kind']} folder: {ANOTHER}")
    planned = plain(recorded_settings(plan.recipe))
    differing = [name for name, value in planned.items() if manifest["recipe"].get(name) != value]
    of_source = manifest["source"]
    if (of_source.get("model"), of_source.get("revision")) != (plan.source.name, plan.source.revision):
        differing.append("source")
    of_backbone = manifest.get("backbone", {})
    name = backbone.source.name
    if (of_backbone.get("model"), of_backbone.get("revision")) != (name, backbone.revision):
        differing.append("backbone")
    if differing:
        raise OutputError(f"{folder} is finished, but its {', '.join(differing)} differs: {ANOTHER}")
    check_files(folder, finished)
    return list(manifest["layers"])


def _report(
    plan: Plan, backbone: GivenBackbone, folder: Path, rows: list[dict[str, Any]], memory: int, seconds: float | None
) -> AdapterReport:
    return AdapterReport(
        folder=folder,
        model=plan.source.name,
        backbone=f"{backbone.source.name}, {backbone.title}",
        task=plan.task.name,
        recipe=recorded_settings(plan.recipe),
        totals=totals_of_adapter(plan, rows),
        layers=rows or [{"name": layer.module, "shape": list(layer.shape)} for layer in plan.layers],
        notes=plan.notes,
        memory=memory,
        seconds=seconds,
    )
