"""`loftq quantize`: a checkpoint streams in, a quantized backbone and its adapter stream out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loftq.artifacts.manifest import write_configs, write_manifest
from loftq.artifacts.staging import Staging, check_output, is_begun, open_staging
from loftq.calibration.gather import calibrate
from loftq.errors import HubError, OptionError
from loftq.formats import artifact
from loftq.hub.destination import find_destination
from loftq.hub.source import find_source
from loftq.hub.text import find_text
from loftq.models.devices import explain_full_memory, find_gpu
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import Recipe
from loftq.solving.allocate import allocate
from loftq.solving.distill import distill, distilled, distilled_row
from loftq.solving.finished import fingerprint_of, finished_layers
from loftq.solving.layers import solve_all
from loftq.solving.memory import needed
from loftq.solving.report import Report, peak_memory, planned_report, report_of
from loftq.verbs.push import push as push_folder

SAVE_DIR = "model_zoo/loftq"
_LESS = (
    "use fewer --workers, on a GPU --device cpu, with text a smaller --sequence-length or --refine 0; --dry-run shows "
    "what each part needs"
)


def quantize(
    model: str | None = None,
    *,
    bits: float = 4,
    allocation: str | None = None,
    adapter: str = "lora",
    rank: int = 16,
    pool_size: int | None = None,
    method: str | None = None,
    scales: str | None = None,
    rounding: str | None = None,
    iters: int | None = None,
    refine: int | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    sequence_length: int | None = None,
    statistics: str | Path | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    quant_type: str | None = None,
    block_size: int | None = None,
    group_size: int | None = None,
    zero_point: str | None = None,
    double_quant: bool = False,
    format: str | None = None,
    compute_dtype: str = "bfloat16",
    target_modules: Sequence[str] | None = None,
    exclude_modules: Sequence[str] = (),
    task: str | None = None,
    num_labels: int | None = None,
    svd: str = "krylov",
    seed: int = 0,
    max_shard_size: str = "5GB",
    save_dir: str | Path = SAVE_DIR,
    output: str | Path | None = None,
    device: str | torch.device | None = None,
    workers: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    push: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Report:
    """Quantize a model and initialize its LoRA adapter: with LoftQ, or, given text to calibrate on, nearer still.

    `model` is a folder or a Hub id; without one, the default model of the zoo. The result is the folder
    `output`, by default `save_dir/{name}-{bits}bit-{rank}rank`. `task` is one of `loftq.models.tasks.TASKS`, by
    default that of the checkpoint's own architecture. `calibration` is a file of text, a data set on the Hub, or
    `default`; what it finds is kept in the folder `statistics`, beside the output by default, for other runs. Layers
    are solved on `device`, a GPU by default where torch finds one. `push` is the id of a repository to which the folder
    then goes, as `loftq.push` sends it; a new one is `private` if asked.
    The settings are those of `loftq quantize --help`. On one machine the same source and settings give the same bytes,
    on any number of workers, resumed or not. Returns the report; raises LoftQError.
    """
    started = time.perf_counter()
    recipe = Recipe(
        bits=bits,
        allocation=allocation,
        adapter=adapter,
        rank=rank,
        pool_size=pool_size,
        method=method,
        scales=scales,
        rounding=rounding,
        iters=iters,
        refine=refine,
        calibration=None if calibration is None else str(calibration),
        calibration_tokens=calibration_tokens,
        sequence_length=sequence_length,
        alpha=alpha,
        rslora=rslora,
        dropout=dropout,
        quant_type=quant_type,
        block_size=block_size,
        group_size=group_size,
        zero_point=zero_point,
        double_quant=double_quant,
        format=format,
        compute_dtype=compute_dtype,
        target_modules=None if target_modules is None else tuple(target_modules),
        exclude_modules=tuple(exclude_modules),
        task=task,
        num_labels=num_labels,
        svd=svd,
        seed=seed,
        max_shard_size=max_shard_size,
    )
    if calibration is not None:
        find_text(str(calibration))
    elif statistics is not None:
        raise OptionError(f"--statistics {statistics}: needs text; add --calibration FILE, or --calibration default")
    if resume and overwrite:
        raise OptionError("--resume and --overwrite exclude each other: finish the run, or start again")
    if private and push is None:
        raise OptionError("--private: is for a repository: name one with --push")
    if push is not None:
        find_destination(push, private=private, token=token).refuse_other_models()
    chosen = _device(device)
    count = _workers(workers, chosen)
    if output is not None and not dry_run:
        check_output(Path(output), resume=resume, overwrite=overwrite)
    source = find_source(
        model, revision=revision, token=token, trust_remote_code=trust_remote_code, headers_only=dry_run
    )
    folder = Path(output) if output else Path(save_dir) / f"{source.label}-{bits:g}bit-{rank}rank"
    if not dry_run:
        check_output(folder, resume=resume, overwrite=overwrite)
    plan = make_plan(source, recipe, trust_remote_code=trust_remote_code)
    if dry_run:
        return planned_report(plan, folder, needed(plan, count, chosen))
    if resume and not is_begun(folder) and (folder / artifact.MANIFEST).is_file():
        rows, measured = finished_layers(folder, plan, trust_remote_code)
    else:
        with explain_full_memory(_LESS):
            plan, rows, measured = _make(plan, folder, statistics, chosen, count, trust_remote_code, overwrite, quiet)
    made = report_of(plan, folder, rows, measured, peak_memory(chosen), time.perf_counter() - started)
    return made if push is None else replace(made, pushed=_push(folder, push, private, token))


def _make(
    plan: Plan,
    folder: Path,
    statistics: str | Path | None,
    device: torch.device,
    workers: int,
    trust_remote_code: bool,
    overwrite: bool,
    quiet: bool,
) -> tuple[Plan, list[dict[str, Any]], dict[str, Any]]:
    """Write the folder, or what is left of it: the plan as calibration and allocation left it, layers and totals."""
    recipe = plan.recipe
    known = calibrate(plan, folder, statistics, device, trust_remote_code, quiet)
    if recipe.allocation == "auto":
        widths = allocate(plan, known, device, workers, quiet)
        plan = make_plan(plan.source, recipe, trust_remote_code=trust_remote_code, widths=widths)
    if known is not None:
        plan = replace(plan, notes=(*plan.notes, *known.notes))
    with open_staging(folder, fingerprint_of(plan, known, device), overwrite=overwrite) as staging:
        if not staging.ready:
            solve_all(plan, staging, known, device, workers, quiet)
            write_configs(plan, staging, folder, trust_remote_code)
            if known is not None and recipe.refinement:
                distill(plan, staging, known, device, quiet)
            write_manifest(plan, staging, _rows(plan, staging), distilled(staging), known.settings if known else None)
        rows, measured = _rows(plan, staging), distilled(staging)
        staging.publish()
    return plan, rows, measured


def _push(folder: Path, repo_id: str, private: bool, token: str | None) -> dict[str, Any]:
    """What pushing the folder did, or a HubError that says that the folder is there."""
    try:
        return push_folder(folder, repo_id, private=private, token=token).to_dict()
    except HubError as error:
        raise HubError(f"{folder} is complete, but not pushed: {error} (`loftq push {folder} {repo_id}`)") from error


def _rows(plan: Plan, staging: Staging) -> list[dict[str, Any]]:
    return [distilled_row(staging, staging.done[layer.tensor]["row"]) for layer in plan.layers]


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = find_gpu() or torch.device("cpu") if device is None else torch.device(device)
        torch.zeros(1, device=chosen).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"--device {device}: not available here ({reason}); cpu always is") from error
    return chosen


def _workers(workers: int | None, device: torch.device) -> int:
    if workers is not None and not 1 <= workers <= 1024:
        raise OptionError(f"--workers {workers}: expected 1 to 1024")
    if workers is None:
        return min(os.cpu_count() or 1, 8) if device.type == "cpu" else 1
    return workers
