"""A sweep before it runs: its settings with those that all cells share, and what each cell needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq.display import columns, size
from loftq.errors import LoftQError, OptionError
from loftq.formats.artifact import MANIFEST
from loftq.formats.scan import hash_of
from loftq.planning.settings import QuantizeSettings, RunSettings
from loftq.settings import from_dict, option_name, plain, split
from loftq.training.recipe_files import read_recipe
from loftq.training.settings import QUANTIZING, settings_of
from loftq.training.sweep_settings import Cell, SweepSettings, listed, quantizing
from loftq.verbs.quantize import quantize

_VARIED = ("bits", "rank", "method", "seed")  # a sweep decides them for each cell
_OF_RUNS = ("revision", "trust_remote_code", "token", "device", "workers", "quiet")
_DECIDED = ("model", "output", "resume", "overwrite", "quiet")  # of a training recipe: the sweep names its own


@dataclass(frozen=True)
class SweepPlan:
    """The settings of a sweep. `shared` are those of quantizing that all cells have, `run` those of each run."""

    settings: SweepSettings
    shared: Mapping[str, Any]
    run: Mapping[str, Any]
    training: Mapping[str, Any] | None = None

    @property
    def cells(self) -> list[Cell]:
        """The cells, narrow before wide."""
        return list(self.settings.cells())

    def quantizing(self, cell: Cell) -> dict[str, Any]:
        """The keywords with which `loftq.quantize` makes a cell."""
        return {**quantizing(cell, self.shared, self.settings.needs_text), **self.run}

    def training_of(self, cell: Cell) -> dict[str, Any]:
        """The keywords with which `loftq.train` trains a cell. Without --seeds, a seed of the recipe holds."""
        recipe = dict(self.training or {})
        return recipe if self.settings.seeds == ("0",) and "seed" in recipe else {**recipe, "seed": cell.seed}

    @property
    def cpu(self) -> bool | None:
        """Whether models are trained and measured on the CPU."""
        return True if str(self.run.get("device")) == "cpu" else None

    def identity(self) -> dict[str, Any]:
        """All that the results depend on, apart from the axes, which a later run may extend."""
        chosen = self.settings
        windows = {name: getattr(chosen, name) for name in ("window", "stride", "max_windows")}
        measured = {"data": list(chosen.evaluate), **windows}
        texts = [str(self.shared.get("calibration", "")), *chosen.evaluate, *_texts_of(self.training)]
        return dict(
            plain(
                {
                    "quantize": {**self.shared, "revision": self.run.get("revision")},
                    "train": self.training,
                    "evaluate": measured if chosen.evaluate else None,
                    "dtype": chosen.dtype,
                    "sha256": {name: hash_of(Path(name)) for name in texts if name and Path(name).is_file()},
                }
            )
        )


def plan_sweep(values: Mapping[str, Any]) -> SweepPlan:
    """Make a plan from settings by name. Raises OptionError, also for the settings of the training recipe."""
    shared, run, own = split(listed(values), QuantizeSettings, RunSettings, SweepSettings)
    for name in run:
        if name not in _OF_RUNS:
            raise OptionError(f"{option_name(name)}: a sweep has no such option: leave it out")
    if shared.get("backbone") is not None:
        raise OptionError("--backbone: a sweep quantizes, and of a given backbone nothing is quantized: leave it out")
    if "seed" in shared:
        raise OptionError("--seed: a sweep has several: use --seeds")
    if run.get("device") is not None:
        run["device"] = str(run["device"])
    settings = from_dict(SweepSettings, own)
    training = None if settings.train is None else _training(settings.train)
    if training is not None:
        moved = {name: training.pop(name) for name in QUANTIZING if name in training}
        shared = {**{name: value for name, value in moved.items() if name not in _VARIED}, **shared}
    checked = from_dict(QuantizeSettings, {**shared, "bits": 4})
    named = {name: getattr(checked, name) for name in shared}
    from_dict(RunSettings, run)
    return SweepPlan(settings, named, run, training)


def _training(text: str) -> dict[str, Any]:
    """The settings of a training recipe FILE, or FILE:RUN. Raises OptionError for one that no cell can have."""
    path, name = text, ""
    if not Path(text).is_file() and ":" in text:
        path, _, name = text.rpartition(":")
    recipe = read_recipe(path, *([name] if name else []))
    for key in _DECIDED:
        recipe.pop(key, None)
    adapter = recipe.pop("adapter", "qlora")
    if adapter != "qlora":
        raise OptionError(
            f"--train {text}: it has adapter {adapter}, but the cells of a sweep are quantized: remove it"
        )
    if recipe.get("push_to_hub"):
        raise OptionError(f"--train {text}: it has push_to_hub, but a sweep makes many adapters: remove it")
    settings_of({**recipe, "model": "cell", "output": "cell"})
    return recipe


def _texts_of(training: Mapping[str, Any] | None) -> list[str]:
    names: list[str] = []
    for key in ("data", "eval_data"):
        value = (training or {}).get(key) or []
        names += [str(value)] if isinstance(value, (str, Path)) else map(str, value)
    return names


@dataclass(frozen=True)
class Planned:
    """What `--dry-run` shows: for each cell its state, sizes and memory, or why it is not possible."""

    folder: Path
    model: str
    cells: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def failed(self) -> int:
        """Number of cells that are not possible."""
        return sum("problem" in row for row in self.cells)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        cells = [dict(row) for row in self.cells]
        return {"folder": str(self.folder), "model": self.model, "cells": cells, "notes": list(self.notes)}

    def table(self) -> str:
        """Return the cells as text for a person."""
        possible = [row for row in self.cells if "problem" not in row]
        lines = [["cell", "bits", "disk", "memory", "state"]]
        lines += [
            [
                str(row["cell"]),
                f"{row['bits_per_weight']:.2f}",
                size(row["bytes"]),
                size(row["memory_bytes"]),
                str(row["state"]),
            ]
            for row in possible
        ]
        missing = sum(row["bytes"] for row in possible if row["state"] != "complete")
        total = f"{len(self.cells)} cells in {self.folder}, {size(missing)} still to write"
        problems = problem_lines((row["cell"], row["problem"]) for row in self.cells if "problem" in row)
        return "\n".join([columns(lines, numbers=True), *problems, total, *self.notes])


def problem_lines(problems: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each problem, after the cells that have it."""
    cells: dict[str, list[str]] = {}
    for cell, problem in problems:
        cells.setdefault(problem, []).append(cell)
    return [f"failed: {', '.join(names)}: {problem}" for problem, names in cells.items()]


def planned(plan: SweepPlan, model: str | None, name: str, folder: Path) -> Planned:
    """What each cell needs, from the headers of the model alone. A cell that is not possible says why."""
    rows: list[dict[str, Any]] = []
    for cell in plan.cells:
        row: dict[str, Any] = {"cell": cell.name, "bits": cell.bits, "rank": cell.rank, "method": cell.method}
        try:
            report = quantize(model, **{**plan.quantizing(cell), "output": folder / cell.name, "dry_run": True})
        except LoftQError as error:
            rows.append({**row, "problem": str(error)})
            continue
        totals = report.totals
        rows.append(
            {
                **row,
                "bits_per_weight": totals["bits_per_weight"],
                "bytes": totals["backbone_bytes"] + totals["adapter_bytes"],
                "memory_bytes": report.memory,
                "state": "complete" if (folder / cell.name / MANIFEST).is_file() else "to do",
            }
        )
    return Planned(folder, name, rows, _notes(plan))


def _notes(plan: SweepPlan) -> list[str]:
    chosen, notes = plan.settings, []
    if chosen.needs_text or plan.shared.get("calibration"):
        times = "once" if len(chosen.seeds) == 1 else "once for each seed"
        notes.append(f"the statistics of the calibration text are gathered {times}, and all cells share them")
    if plan.training is not None:
        notes.append(f"each cell is trained by {chosen.train}: `loftq train --dry-run` shows what that needs")
    if chosen.evaluate:
        measured = "its start and its trained adapter" if plan.training is not None else "its start"
        notes.append(f"the perplexity of full precision is measured once, that of each cell for {measured}")
    return notes
