"""`loftq quantize`: reads a checkpoint tensor by tensor, and writes a quantized backbone and its adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from loftq.artifacts.manifest import write_configs, write_manifest
from loftq.artifacts.staging import Staging, check_output, is_begun, open_staging
from loftq.calibration.gather import calibrate
from loftq.chatter import silenced
from loftq.errors import HubError, OptionError
from loftq.formats import artifact
from loftq.formats.disk import explain_os_errors
from loftq.formats.space import check_space
from loftq.hub.destination import find_destination
from loftq.hub.names import repository_of
from loftq.hub.source import Source, find_source, side_files
from loftq.hub.text import find_text
from loftq.models.devices import explain_full_memory
from loftq.planning.given_backbone import adapter_recipe
from loftq.planning.keywords import QuantizeKeywords
from loftq.planning.old_start import OldStart, adopting, check_modules, find_old_start
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import Recipe, resolve
from loftq.planning.run import Run, start
from loftq.planning.settings import QuantizeSettings, RunSettings
from loftq.settings import from_dict, split
from loftq.solving.adopt import ADOPTED, Adopter, adoption_notes
from loftq.solving.allocate import allocate
from loftq.solving.distill import distill, distilled, distilled_row, reopen
from loftq.solving.finished import check_source, fingerprint_of, finished_layers
from loftq.solving.given import AdapterReport
from loftq.solving.layers import solve_all
from loftq.solving.memory import needed
from loftq.solving.report import Report, peak_memory, planned_report, report_of
from loftq.verbs.push import push as push_folder
from loftq.verbs.quantize_given import quantize_given

if TYPE_CHECKING:
    from loftq.cluster.cluster import Cluster

_LESS = (
    "use fewer --workers; on a GPU, use --device cpu; with calibration, use a smaller --sequence-length or --refine 0; "
    "--dry-run shows how much memory each part needs"
)


@silenced()
def quantize(model: str | None = None, **settings: Unpack[QuantizeKeywords]) -> Report:
    """Quantize a model and initialize its LoRA adapter with LoftQ. Calibration on text reduces the error further.

    `model` is a folder or the id of a model on the Hub; by default, it is the default model of the zoo. The keywords
    are the options of `loftq quantize --help` with underscores; `iters` is `--iter`. The result is the folder `output`,
    by default `save_dir/{name}-{bits}bit-{rank}rank`; with `backbone`, it is that of an adapter alone. On the same
    machine, or on a `cluster` of machines of its kind, the same source and settings give the same bytes, with any
    number of workers, and also if the run was interrupted and resumed. Returns the report. Raises LoftQError.
    """
    started = time.perf_counter()
    result_settings, run_settings = split(settings, QuantizeSettings, RunSettings)
    requested = from_dict(QuantizeSettings, result_settings)
    recipe = resolve(requested) if requested.backbone is None else adapter_recipe(requested)
    if run_settings.get("device") is not None:
        run_settings["device"] = str(run_settings["device"])  # settings are plain values, not a torch.device
    run_options = from_dict(RunSettings, run_settings)
    run = start(run_options)
    _check_text(recipe, run)
    if run_options.push is not None:
        find_destination(run_options.push, private=run_options.private, token=run.token).refuse_other_models()
    if run_options.source is not None and recipe.backbone is not None:
        raise OptionError("--source and --backbone exclude each other: with --backbone, MODEL is the source")
    source = _find(model, run_options)
    if recipe.backbone is not None:
        _refuse_cluster(run, f"--backbone {recipe.backbone}", "an adapter for a given model")
        return _quantize_given(source, recipe, run_options, run)
    old = find_old_start(source)
    if old is not None:
        _refuse_cluster(run, source.name, "a folder of the original LoftQ script")
        recipe = resolve(adopting(old, recipe.requested))
    elif run_options.source is not None:
        raise OptionError(
            f"--source {run_options.source}: {source.name} is not a folder of the original LoftQ script: leave it out"
        )
    folder = _folder(source, recipe, run_options)
    if run_options.dry_run:
        report = planned(source, recipe, run_options)
        return report if old is None else replace(report, notes=(ADOPTED, *report.notes))
    _check_output(folder, run_options)
    plan = make_plan(source, recipe, trust_remote_code=run.trust_remote_code)
    job = None if old is None else _adopter(plan, old, run_options)
    if run.resume and not is_begun(folder) and (folder / artifact.MANIFEST).is_file():
        result = _Result(plan, *finished_layers(folder, plan, run.trust_remote_code))
    else:
        any_device = run_options.device is None
        with explain_full_memory(_LESS), _joined(run, None if model is None else source.name, any_device) as cluster:
            result = _make(plan, folder, run if cluster is None else cluster.run, job, cluster)
    memory, seconds = peak_memory(run.device), time.perf_counter() - started
    report = report_of(result.plan, folder, result.rows, result.totals, memory, seconds)
    return report if run_options.push is None else replace(report, pushed=_push(folder, run_options))


def _quantize_given(source: Source, recipe: Recipe, run_options: RunSettings, run: Run) -> AdapterReport:
    given = str(recipe.backbone)
    name = Path(repository_of(given)[0]).name
    folder = Path(run_options.output or Path(run_options.save_dir) / f"{name}-{recipe.rank}rank-adapter")
    _check_output(folder, run_options)
    with explain_full_memory(_LESS):
        report = quantize_given(source, recipe, folder, run, given=given, dry_run=run_options.dry_run)
    if run_options.push is None or run_options.dry_run:
        return report
    return replace(report, pushed=_push(folder, run_options))


def planned(source: Source, recipe: Recipe, run_options: RunSettings) -> Report:
    """The report of a plan, for which the headers of a source are enough. Nothing is written. Raises LoftQError."""
    run = start(run_options)
    _check_text(recipe, run)
    plan = make_plan(source, recipe, trust_remote_code=run.trust_remote_code)
    folder = _folder(source, recipe, run_options)
    with _joined(run, source.name, run_options.device is None) as cluster:
        if cluster is None:
            return planned_report(plan, folder, needed(plan, run.workers, run.device))
        return planned_report(plan, folder, needed(plan, 1, cluster.run.device), cluster.estimate(plan))


@contextmanager
def _joined(run: Run, model: str | None, any_device: bool) -> Iterator[Cluster | None]:
    """The cluster on which a run works on a model, the default one if it is None; None if it works in this process."""
    if run.cluster is None:
        yield None
        return
    from loftq.cluster.cluster import open_cluster  # imports nothing of Ray until it is called

    with open_cluster(run, model, any_device=any_device) as cluster:
        yield cluster


def _refuse_cluster(run: Run, what: str, work: str) -> None:
    """Raise OptionError for work that is not spread over a cluster."""
    if run.cluster is not None:
        raise OptionError(f"--cluster: {work} is worked on in one process ({what}): leave out --cluster")


@dataclass(frozen=True)
class _Result:
    """The plan after calibration and allocation, a row for each layer, and totals that are not sums of the rows."""

    plan: Plan
    rows: list[dict[str, Any]]
    totals: dict[str, Any]


def _check_text(recipe: Recipe, run: Run) -> None:
    """Raise an error for a text that does not exist, and for statistics without a text."""
    if recipe.calibration is not None:
        find_text(recipe.calibration)
    elif run.statistics is not None:
        raise OptionError(
            f"--statistics {run.statistics} needs a calibration text: add --calibration FILE or --calibration default"
        )


def _check_output(folder: Path, run_options: RunSettings) -> None:
    """Raise OutputError if the folder exists and must not be overwritten."""
    if not run_options.dry_run:
        check_output(folder, resume=run_options.resume, overwrite=run_options.overwrite)


def _find(model: str | None, run_options: RunSettings) -> Source:
    """The model. Raises OutputError before anything is downloaded if the output must not be overwritten."""
    if run_options.output is not None:
        _check_output(Path(run_options.output), run_options)
    return find_source(
        model,
        revision=run_options.revision,
        token=run_options.token,
        trust_remote_code=run_options.trust_remote_code,
        headers_only=run_options.dry_run,
    )


def _adopter(plan: Plan, old: OldStart, run_options: RunSettings) -> Adopter:
    check_modules(old, plan)
    original = None
    if run_options.source is not None:
        original = find_source(run_options.source, token=run_options.token)
    job = Adopter(plan, old, original)
    job.check_first()
    return job


def _folder(source: Source, recipe: Recipe, run_options: RunSettings) -> Path:
    if run_options.output is not None:
        return Path(run_options.output)
    return Path(run_options.save_dir) / f"{source.label}-{recipe.bits:g}bit-{recipe.rank}rank"


def _make(plan: Plan, folder: Path, run: Run, job: Adopter | None, cluster: Cluster | None) -> _Result:
    """Write the folder, or the missing part of it. `job` is what adopts layers that are quantized already."""
    recipe = plan.recipe
    with explain_os_errors(folder):
        copied = sum(path.stat().st_size for path in side_files(plan.source.folder, run.trust_remote_code))
        check_space(folder, plan.backbone_bytes + plan.adapter.nbytes + copied)
    if cluster is not None:
        cluster.check(plan)
    statistics = calibrate(plan, folder, run, None if cluster is None else cluster.forward(plan))
    if recipe.measures_widths:
        widths = allocate(plan, statistics, run, None if cluster is None else cluster.measure(plan, statistics))
        plan = make_plan(plan.source, recipe, trust_remote_code=run.trust_remote_code, widths=widths)
    if statistics is not None:
        plan = replace(plan, notes=(*plan.notes, *statistics.notes))
    fingerprint = fingerprint_of(plan, statistics, run.device, run.trust_remote_code)
    with open_staging(folder, fingerprint, overwrite=run.overwrite) as staging:
        if not staging.ready:
            reopen(staging)
            solve_all(
                plan,
                staging,
                statistics,
                run,
                job,
                None if cluster is None else cluster.solve(plan, staging, statistics),
            )
            if job is not None:
                plan = replace(plan, notes=(*plan.notes, *adoption_notes(plan, staging)))
            write_configs(plan, staging, folder, run.trust_remote_code)
            if statistics is not None and statistics.has_answers and recipe.refine:
                distill(
                    plan,
                    staging,
                    statistics,
                    run,
                    None if cluster is None else cluster.refine(plan, staging, statistics),
                )
            check_source(plan, fingerprint, run.trust_remote_code)
            calibration = statistics.settings if statistics else None
            write_manifest(plan, staging, _rows(plan, staging), distilled(staging), calibration)
        result = _Result(plan, _rows(plan, staging), distilled(staging))
        staging.publish()
    return result


def _rows(plan: Plan, staging: Staging) -> list[dict[str, Any]]:
    return [distilled_row(staging, staging.done[layer.tensor]["row"]) for layer in plan.layers]


def _push(folder: Path, run_options: RunSettings) -> dict[str, Any]:
    """The report of the push as plain values. Raises HubError with the command that pushes the folder again."""
    repo_id = str(run_options.push)
    try:
        return push_folder(folder, repo_id, private=run_options.private, token=run_options.token).to_dict()
    except HubError as error:
        raise HubError(
            f"{folder} is complete, but not pushed: {error} (push it with `loftq push {folder} {repo_id}`)"
        ) from error
