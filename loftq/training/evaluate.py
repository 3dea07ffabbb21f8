"""Measure a model and its adapter, beside what it was made from: one table."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from loftq.display import columns
from loftq.errors import OptionError, UnknownNameError
from loftq.formats.artifact import CARD, MANIFEST, Artifact, open_artifact
from loftq.formats.disk import write_whole
from loftq.models.devices import compute_dtype, device_to_run
from loftq.planning.recipe import Recipe
from loftq.training.data import read_rows
from loftq.training.measures import MEASURES, Options
from loftq.training.model import find_model
from loftq.training.opening import Opened, load_source, open_to_use
from loftq.training.process import explain_memory, hush
from loftq.training.settings import option
from loftq.training.tasks import TRAINING_TASKS
from loftq.verbs.quantize import quantize

_PLAIN = {"method": "qlora", "scales": None, "rounding": None, "iters": None, "refine": None}
_TEXT = ("calibration", "calibration_tokens", "sequence_length")


@dataclass(frozen=True)
class Evaluation:
    """What was measured of each model, and how."""

    task: str
    data: str
    rows: Mapping[str, Mapping[str, float]]
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"task": self.task, "data": self.data, "models": self.rows, "notes": list(self.notes)}

    def table(self) -> str:
        """The figures, for a person: a model a line."""
        return "\n".join([columns(self._cells(), numbers=True), *self.notes])

    def _cells(self) -> list[list[str]]:
        """A heading, and a line for each model."""
        names = list(next(iter(self.rows.values())))
        return [["", *names]] + [[name, *(_shown(row[key]) for key in names)] for name, row in self.rows.items()]

    def section(self) -> str:
        """The same for a model card: under a heading that names the task and the data."""
        heading, *models = self._cells()
        rows = "\n".join(f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *models))
        return "\n\n".join([f"### {self.task}, {Path(self.data).name}", rows, *self.notes]) + "\n"


def _shown(value: float) -> str:
    if float(value).is_integer() and abs(value) >= 1:
        return f"{value:.0f}"
    return f"{value:.4f}" if value < 1e4 else f"{value:.2e}"


def evaluate(
    model: str,
    *,
    data: Sequence[str] | str,
    task: str = "perplexity",
    adapter: str | None = None,
    compare: bool = False,
    source: str | None = None,
    columns: Mapping[str, str] | None = None,
    chat_template: bool | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_examples: int | None = None,
    max_new_tokens: int | None = None,
    cutoff_len: int = 1024,
    batch_size: int = 8,
    card: bool = False,
    dtype: str | None = None,
    cpu: bool | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Measure an artifact with its own adapter or a trained one, or a full-precision model, on a task of `MEASURES`.

    With `compare` the table begins with the full-precision model (`source`, by default the one that the artifact was
    made from), its plain quantization by the same recipe, and the artifact's own start. With `card` the table goes into
    the artifact's card. Raises LoftQError.
    """
    if task not in MEASURES:
        raise UnknownNameError("task", task, MEASURES)
    _check_use(
        task, columns or {}, window=window, stride=stride, max_new_tokens=max_new_tokens, chat_template=chat_template
    )
    if source is not None and not compare:
        raise OptionError(f"--source {source}: goes with --compare, which measures it too")
    if card and not (Path(model) / MANIFEST).is_file():
        raise OptionError(f"--card: {model} is no folder that `loftq quantize` wrote: it has no card of ours")
    for name, value in (("--window", window), ("--stride", stride), ("--max-examples", max_examples)):
        if value is not None and value < (2 if name == "--window" else 1):
            raise OptionError(f"{name} {value}: expected {2 if name == '--window' else 1} or more")
    if min(batch_size, max_new_tokens or 1) < 1 or cutoff_len < 8:
        raise OptionError("--batch-size, --max-new-tokens: expected 1 or more; --cutoff-len: 8 or more")
    names = (data,) if isinstance(data, str) else tuple(data)
    hush(quiet)
    rows = read_rows(names)
    if max_examples is not None:
        rows = rows.select(range(min(max_examples, len(rows))))
    options = Options(columns or {}, chat_template, window, stride, max_new_tokens, cutoff_len, batch_size, quiet)
    device = device_to_run(cpu)
    chosen = compute_dtype(dtype, device)
    found: dict[str, dict[str, float]] = {}
    with explain_memory():
        for name, open_it in _models(model, adapter, source, device, chosen, compare=compare, quiet=quiet):
            opened = open_it()
            TRAINING_TASKS[MEASURES[task].like].require(task, opened.task.name, name)
            found[name] = MEASURES[task].measure(opened, rows, options)
            del opened
    evaluation = Evaluation(task, ", ".join(names), found, _notes(task, found))
    if card:
        _into_card(Path(model) / CARD, evaluation)
    return evaluation


def _check_use(task: str, columns: Mapping[str, str], **options: Any) -> None:
    """Raises OptionError for a column and for an option that a task does not read."""
    roles = TRAINING_TASKS[MEASURES[task].like].roles
    for name in columns:
        if name not in roles:
            raise UnknownNameError("column", name, roles)
    for name, value in options.items():
        if value is not None and name not in MEASURES[task].options:
            readers = " and ".join(reader for reader, measure in MEASURES.items() if name in measure.options)
            raise OptionError(f"{option(name)}: --task {task} does not use it; {readers} would: leave it out")


def _into_card(path: Path, evaluation: Evaluation) -> None:
    """At the card's end, in place of an earlier measurement of the same."""
    text = path.read_text(encoding="utf-8")
    section = evaluation.section()
    heading = re.escape(section.partition("\n")[0])
    kept = re.sub(rf"\n{heading}\n.*?(?=\n#|\Z)", "", text, flags=re.DOTALL)
    write_whole(path, f"{kept.rstrip()}\n\n{section}")


Candidate = tuple[str, Callable[[], Opened]]


def _models(
    model: str,
    adapter: str | None,
    source: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compare: bool,
    quiet: bool,
) -> Iterator[Candidate]:
    """What is measured, each opened when its turn comes."""
    found = find_model(model)
    artifact = found if isinstance(found, Artifact) else None
    if compare:
        if artifact is None:
            raise OptionError(
                f"--compare: {model} was not made by `loftq quantize`: there is nothing to compare it with"
            )
        origin = source or str(artifact.manifest["source"]["model"])
        yield "full precision", lambda: load_source(origin, artifact, device, dtype)
        with tempfile.TemporaryDirectory() as folder:
            yield (
                "plain quantization",
                lambda: _plain(artifact, origin, Path(folder) / "plain", device, dtype, quiet=quiet),
            )
        yield "start", lambda: open_to_use(found, None, device, dtype)
        if adapter is None:
            return
    name = "trained" if adapter is not None else "start" if artifact is not None else "model"
    yield name, lambda: open_to_use(found, adapter, device, dtype)


def _plain(
    artifact: Artifact, source: str, folder: Path, device: torch.device, dtype: torch.dtype, *, quiet: bool
) -> Opened:
    """The same recipe with the nearest codes and an adapter that adds nothing: QLoRA's start."""
    known = {entry.name for entry in fields(Recipe)}
    recipe = {name: value for name, value in artifact.manifest["recipe"].items() if name in known} | _PLAIN
    recipe |= dict.fromkeys(_TEXT)
    quantize(source, output=folder, quiet=quiet, **recipe)
    return open_to_use(open_artifact(folder), None, device, dtype)


# Measures


def _notes(task: str, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    if task == "classification" and len(found) > 1:
        return ["a head that was not trained answers by chance"]
    return []
