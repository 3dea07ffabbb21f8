"""Quantizes, trains and measures a model in many ways, and compares them: `loftq sweep`.

The folder of a sweep holds a folder for each cell, and `sweep.json` with a row for each. A row is written after each
step, so an interrupted sweep continues from the step that was interrupted, and complete cells are not made again.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

from loftq.artifacts.manifest import VERSIONS
from loftq.core.solvers.methods import METHODS
from loftq.display import columns, one_line
from loftq.errors import LoftQError, OutputError
from loftq.formats.artifact import MANIFEST, open_artifact
from loftq.formats.disk import explain_os_errors, make_folder
from loftq.formats.schema import read_json
from loftq.hub.source import find_source
from loftq.models.adapters import TRAINING_RECORD
from loftq.models.devices import device_name, device_to_run
from loftq.planning.run import start
from loftq.planning.settings import RunSettings
from loftq.reporting.sweep_record import BEGUN, COMPLETE, FAILED, PAGE, VERSION, read_sweep, write_sweep
from loftq.settings import from_dict
from loftq.training.evaluate import evaluate
from loftq.training.sweep_keywords import SweepKeywords
from loftq.training.sweep_plan import Planned, SweepPlan, plan_sweep, planned, problem_lines
from loftq.training.sweep_settings import Cell
from loftq.training.train import train
from loftq.verbs.quantize import quantize
from loftq.verbs.report import report

_log = logging.getLogger(__name__)
_OF_SOURCES = ("revision", "token", "trust_remote_code")


@dataclass(frozen=True)
class Swept:
    """The result of a sweep: its folder, and the record that `sweep.json` holds."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def failed(self) -> int:
        """Number of cells that failed."""
        return sum(row["status"] == FAILED for row in self.record["cells"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"folder": str(self.folder), **self.record}

    def table(self) -> str:
        """Return the cells as text for a person."""
        shown = {
            "weights": ("weight_error", ".4f"),
            "outputs": ("output_error", ".4f"),
            "start": ("start_perplexity", ".4g"),
            "trained": ("trained_perplexity", ".4g"),
            "loss": ("train_loss", ".4f"),
        }
        rows = self.record["cells"]
        complete = [row for row in rows if row["status"] == COMPLETE]
        used = [name for name, (key, _) in shown.items() if any(row.get(key) is not None for row in rows)]
        lines = [["cell", *used]]
        for row in complete:
            cells = [(row.get(shown[name][0]), shown[name][1]) for name in used]
            lines.append([row["cell"], *("" if value is None else format(value, form) for value, form in cells)])
        full = self.record["full_precision"].get("perplexity")
        return "\n".join(
            [
                columns(lines, numbers=True),
                *([] if full is None else [f"perplexity of full precision: {full:.4g}"]),
                *problem_lines((row["cell"], row["problem"]) for row in rows if row["status"] == FAILED),
                f"{len(complete)} of {len(rows)} cells are complete in {self.folder}",
            ]
        )


def sweep(model: str | None = None, **settings: Unpack[SweepKeywords]) -> Swept | Planned:
    """Quantize a model with each combination of `bits`, `rank`, `method` and `seeds`, and compare the results.

    The keywords are the options of `loftq sweep --help`, with underscores; an axis is a list, or a text with commas.
    With `train` each cell is trained by a recipe, with `evaluate` its perplexity is measured. The statistics of the
    calibration text are gathered once. A cell that fails is recorded, and the others go on. The same call continues an
    interrupted sweep, makes failed cells again, and adds new cells to those that are there. Raises LoftQError.
    """
    plan = plan_sweep(settings)
    options = {name: value for name, value in plan.run.items() if name in _OF_SOURCES}
    source = find_source(model, **options, headers_only=True)
    folder = Path(plan.settings.output or f"{source.label}-sweep").expanduser()
    record = _begin(folder, source.name, plan)
    if plan.settings.dry_run:
        return planned(plan, model, source.name, folder)
    make_folder(folder)
    with explain_os_errors(folder):
        write_sweep(folder, record)
        _Sweep(model, folder, plan, record).run()
    return Swept(folder, record)


def _begin(folder: Path, model: str, plan: SweepPlan) -> dict[str, Any]:
    """The record of a new sweep, or of the one that is in the folder. Raises OutputError for another one."""
    identity = plan.identity()
    record = read_sweep(folder)
    if record is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder} is not empty and holds no sweep, so it stays unchanged: name another --output")
        record = {"format_version": VERSION, "full_precision": {}, "cells": []}
    else:
        earlier = {"model": record["model"], **record["settings"]}
        hashes = earlier.get("sha256", {})
        earlier["sha256"] = {name: hashes.get(name, digest) for name, digest in identity["sha256"].items()}
        for name, value in {"model": model, **identity}.items():
            if earlier.get(name) not in (None, {}, value):
                raise OutputError(
                    f"{folder} holds a sweep with another {_differing(name, earlier[name], value)}: name another "
                    "--output, or use the same settings again"
                )
    versions = {**{name: version(name) for name in VERSIONS}, "python": platform.python_version()}
    return {**record, "model": model, "settings": identity, "versions": versions, "devices": _devices(plan)}


def _differing(name: str, earlier: Any, value: Any) -> str:
    """What differs in an entry: the names within it, if it is a table."""
    if isinstance(earlier, dict) and isinstance(value, dict):
        return ", ".join(sorted(key for key in {*earlier, *value} if earlier.get(key) != value.get(key)))
    return name


def _devices(plan: SweepPlan) -> dict[str, str]:
    """Where cells are solved, and where they are trained and measured, in words."""
    solve = start(from_dict(RunSettings, {**plan.run, "dry_run": False})).device
    return {"solve": device_name(solve), "run": device_name(device_to_run(plan.cpu))}


class _Sweep:
    """A sweep that runs. Each step adds its figures to the row of its cell, and is left out if they are there."""

    def __init__(self, model: str | None, folder: Path, plan: SweepPlan, record: dict[str, Any]) -> None:
        self._model, self._folder, self._plan, self._record = model, folder, plan, record
        self._quiet = bool(plan.run.get("quiet", True))
        wanted = {cell.name for cell in plan.cells}
        kept = [row for row in record["cells"] if row["cell"] in wanted or row["status"] == COMPLETE]
        self._rows: dict[str, dict[str, Any]] = {row["cell"]: row for row in kept}

    def run(self) -> None:
        """Make all cells. An error of one cell is recorded in its row."""
        if self._plan.settings.evaluate and "perplexity" not in self._record["full_precision"]:
            self._say("full precision: evaluate")
            options = {name: value for name, value in self._plan.run.items() if name in _OF_SOURCES}
            source = find_source(self._model, **options)
            self._record["full_precision"] = {"perplexity": self._perplexity(str(source.folder), None)}
        cells = self._plan.cells
        for number, cell in enumerate(cells, 1):
            self._make(cell, f"{number}/{len(cells)} {cell.name}")
        self._write_page()

    def _make(self, cell: Cell, place: str) -> None:
        row = self._row_of(cell)
        steps: dict[str, Callable[[Cell, dict[str, Any]], None]] = {"quantize": self._quantize}
        if self._plan.settings.evaluate:
            steps["evaluate"] = self._measure_start
        if self._plan.training is not None:
            steps["train"] = self._train
            if self._plan.settings.evaluate:
                steps["evaluate trained"] = self._measure_trained
        try:
            for name, step in steps.items():
                self._say(f"{place}: {name}", row, name)
                step(cell, row)
                row.setdefault("steps", [])
                row["steps"] = [*dict.fromkeys([*row["steps"], name])]
                self._save()
            row["status"] = COMPLETE
        except Exception as error:  # whatever it is: the night's other cells go on
            _log.debug(place, exc_info=error)
            row |= {"status": FAILED, "problem": _problem(error)}
            self._say(f"{place}: failed: {row['problem']}")
        self._save()

    def _row_of(self, cell: Cell) -> dict[str, Any]:
        """The row of a cell as an earlier run left it, or a new one if its folder is not the one of the row."""
        row = self._rows.get(cell.name, {})
        if row.get("backbone_sha256") != self._hash_of(cell):
            row = {}
        axes = {"bits": cell.bits, "rank": cell.rank, "method": cell.method, "seed": cell.seed}
        kept = {name: value for name, value in row.items() if name != "problem"}
        self._rows[cell.name] = {**kept, "cell": cell.name, **axes, "status": BEGUN}
        self._save()
        return self._rows[cell.name]

    def _hash_of(self, cell: Cell) -> str | None:
        folder = self._folder / cell.name
        try:
            return open_artifact(folder).backbone_hash if (folder / MANIFEST).is_file() else None
        except LoftQError:
            return None

    def _quantize(self, cell: Cell, row: dict[str, Any]) -> None:
        if row.get("backbone_sha256") is not None:
            return
        folder = self._folder / cell.name
        made = quantize(self._model, **{**self._plan.quantizing(cell), "output": folder, "resume": True})
        totals = made.totals
        names = ("bits_per_weight", "backbone_bytes", "adapter_bytes", "plain_error", "output_plain_error")
        figures = {name: totals.get(name) for name in (*names, "output_error", "divergence")}
        row |= {name: value for name, value in figures.items() if value is not None}
        row |= {"weight_error": totals["error"], "quantize_seconds": made.seconds}
        row["backbone_sha256"] = self._hash_of(cell)

    def _measure_start(self, cell: Cell, row: dict[str, Any]) -> None:
        if "start_perplexity" not in row:
            row["start_perplexity"] = self._perplexity(str(self._folder / cell.name), None)

    def _train(self, cell: Cell, row: dict[str, Any]) -> None:
        if "train_loss" in row:
            return
        output = self._folder / cell.trained
        path = output / TRAINING_RECORD
        finished = path.is_file() and "result" in read_json(path, {})
        if not finished:
            options = {**self._plan.training_of(cell), "output": output, "resume": True, "quiet": self._quiet}
            options |= {"dtype": self._plan.settings.dtype} if self._plan.settings.dtype else {}
            options |= {"cpu": True} if self._plan.cpu else {}
            train(str(self._folder / cell.name), **options)
        result = read_json(path, {"result": {"train_loss": float, "steps": int, "seconds": float}})["result"]
        held_out = {"held_out_loss": result.get("evaluation", {}).get("loss")}
        row |= {name: value for name, value in held_out.items() if value is not None}
        row |= {"train_loss": result["train_loss"], "train_steps": result["steps"], "train_seconds": result["seconds"]}

    def _measure_trained(self, cell: Cell, row: dict[str, Any]) -> None:
        if "trained_perplexity" not in row:
            adapter = str(self._folder / cell.trained)
            row["trained_perplexity"] = self._perplexity(str(self._folder / cell.name), adapter)

    def _perplexity(self, model: str, adapter: str | None) -> float:
        chosen = self._plan.settings
        result = evaluate(
            model,
            adapter=adapter,
            data=list(chosen.evaluate),
            window=chosen.window,
            stride=chosen.stride,
            max_windows=chosen.max_windows,
            dtype=chosen.dtype,
            cpu=self._plan.cpu,
            quiet=self._quiet,
        )
        return next(iter(result.rows.values()))["perplexity"]

    def _write_page(self) -> None:
        """Write the report of the complete cells. Without the packages that it needs, a line says so."""
        complete = [self._folder / name for name, row in self._rows.items() if row["status"] == COMPLETE]
        if not complete:
            return
        try:
            report([self._folder], html=self._folder / PAGE, overwrite=True)
        except LoftQError as error:
            self._say(f"no {PAGE}: {error}")

    def _save(self) -> None:
        """Write the record, the cells in the order of their axes."""
        names = list(METHODS)
        self._record["cells"] = sorted(
            self._rows.values(), key=lambda row: (row["bits"], row["rank"], names.index(row["method"]), row["seed"])
        )
        write_sweep(self._folder, self._record)

    def _say(self, text: str, row: Mapping[str, Any] | None = None, step: str = "") -> None:
        """Log a line, but not for a step that is done already."""
        if row is None or step not in row.get("steps", ()):
            _log.info(text)


def _problem(error: Exception) -> str:
    text = one_line(error, 500)
    return text if isinstance(error, LoftQError) else f"{type(error).__name__}: {text}"
