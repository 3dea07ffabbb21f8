"""`loftq quantize`: a checkpoint streams in, a quantized backbone and its adapter stream out."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from loftq.artifacts.manifest import write_configs, write_manifest
from loftq.artifacts.staging import Staging, check_output, is_begun, open_staging
from loftq.calibration.gather import calibrate
from loftq.errors import HubError, OptionError
from loftq.formats import artifact
from loftq.hub.destination import find_destination
from loftq.hub.source import Source, find_source
from loftq.hub.text import find_text
from loftq.models.devices import explain_full_memory
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import Recipe, resolve
from loftq.planning.run import Run, start
from loftq.planning.settings import QuantizeKeywords, QuantizeSettings, RunSettings
from loftq.settings import from_dict, split
from loftq.solving.allocate import allocate
from loftq.solving.distill import distill, distilled, distilled_row
from loftq.solving.finished import fingerprint_of, finished_layers
from loftq.solving.layers import solve_all
from loftq.solving.memory import needed
from loftq.solving.report import Report, peak_memory, planned_report, report_of
from loftq.verbs.push import push as push_folder

_LESS = (
    "use fewer --workers, on a GPU --device cpu, with text a smaller --sequence-length or --refine 0; --dry-run shows "
    "what each part needs"
)


def quantize(model: str | None = None, **settings: Unpack[QuantizeKeywords]) -> Report:
    """Quantize a model and initialize its LoRA adapter: with LoftQ, or, given text to calibrate on, nearer still.

    `model` is a folder or the id of a model on the Hub; without one, the default model of the zoo is taken. The
    keywords are the options of `loftq quantize --help`, with underscores; `iters` is `--iter`. The result is the folder
    `output`, by default `save_dir/{name}-{bits}bit-{rank}rank`. On one machine the same source and settings give the
    same bytes, on any number of workers, interrupted and resumed or not. Returns the report. Raises LoftQError.
    """
    started = time.perf_counter()
    for_result, for_run = split(settings, QuantizeSettings, RunSettings)
    recipe = resolve(from_dict(QuantizeSettings, for_result))
    if for_run.get("device") is not None:
        for_run["device"] = str(for_run["device"])  # a torch.device has no place in plain settings
    where = from_dict(RunSettings, for_run)
    run = start(where)
    _check_text(recipe, run)
    if where.push is not None:
        find_destination(where.push, private=where.private, token=run.token).refuse_other_models()
    source, folder = _find(model, recipe, where)
    plan = make_plan(source, recipe, trust_remote_code=run.trust_remote_code)
    if where.dry_run:
        return planned_report(plan, folder, needed(plan, run.workers, run.device))
    if run.resume and not is_begun(folder) and (folder / artifact.MANIFEST).is_file():
        result = _Result(plan, *finished_layers(folder, plan, run.trust_remote_code))
    else:
        with explain_full_memory(_LESS):
            result = _make(plan, folder, run)
    memory, seconds = peak_memory(run.device), time.perf_counter() - started
    report = report_of(result.plan, folder, result.rows, result.totals, memory, seconds)
    return report if where.push is None else replace(report, pushed=_push(folder, where))


@dataclass(frozen=True)
class _Result:
    """The plan after calibration and allocation, a row for each layer, and totals that are not sums of the rows."""

    plan: Plan
    rows: list[dict[str, Any]]
    totals: dict[str, Any]


def _check_text(recipe: Recipe, run: Run) -> None:
    """Refuse a text that is not there, and statistics without a text."""
    if recipe.calibration is not None:
        find_text(recipe.calibration)
    elif run.statistics is not None:
        raise OptionError(
            f"--statistics {run.statistics}: needs text; add --calibration FILE, or --calibration default"
        )


def _find(model: str | None, recipe: Recipe, where: RunSettings) -> tuple[Source, Path]:
    """The model, and the folder to write, which is refused where it is in the way."""

    def refuse(folder: Path) -> None:
        if not where.dry_run:
            check_output(folder, resume=where.resume, overwrite=where.overwrite)

    if where.output is not None:
        refuse(Path(where.output))  # before anything is downloaded
    source = find_source(
        model,
        revision=where.revision,
        token=where.token,
        trust_remote_code=where.trust_remote_code,
        headers_only=where.dry_run,
    )
    usual = Path(where.save_dir) / f"{source.label}-{recipe.bits:g}bit-{recipe.rank}rank"
    folder = usual if where.output is None else Path(where.output)
    refuse(folder)
    return source, folder


def _make(plan: Plan, folder: Path, run: Run) -> _Result:
    """Write the folder, or what is missing of it."""
    recipe = plan.recipe
    statistics = calibrate(plan, folder, run)
    if recipe.allocation == "auto":
        widths = allocate(plan, statistics, run)
        plan = make_plan(plan.source, recipe, trust_remote_code=run.trust_remote_code, widths=widths)
    if statistics is not None:
        plan = replace(plan, notes=(*plan.notes, *statistics.notes))
    with open_staging(folder, fingerprint_of(plan, statistics, run.device), overwrite=run.overwrite) as staging:
        if not staging.ready:
            solve_all(plan, staging, statistics, run)
            write_configs(plan, staging, folder, run.trust_remote_code)
            if statistics is not None and recipe.refine:
                distill(plan, staging, statistics, run)
            calibration = statistics.settings if statistics else None
            write_manifest(plan, staging, _rows(plan, staging), distilled(staging), calibration)
        result = _Result(plan, _rows(plan, staging), distilled(staging))
        staging.publish()
    return result


def _rows(plan: Plan, staging: Staging) -> list[dict[str, Any]]:
    return [distilled_row(staging, staging.done[layer.tensor]["row"]) for layer in plan.layers]


def _push(folder: Path, where: RunSettings) -> dict[str, Any]:
    """The report of the push as plain values. Raises a HubError that says that the folder is there."""
    repo_id = str(where.push)
    try:
        return push_folder(folder, repo_id, private=where.private, token=where.token).to_dict()
    except HubError as error:
        raise HubError(f"{folder} is complete, but not pushed: {error} (`loftq push {folder} {repo_id}`)") from error
