"""Measures a model with its adapter, and with `compare` also the models that it comes from, in a single table."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

import torch

from loftq.artifacts.card_section import read_card
from loftq.artifacts.manifest import VERSIONS
from loftq.chatter import silenced_with_data
from loftq.display import columns, markdown
from loftq.errors import OptionError, UnknownNameError
from loftq.formats.artifact import CARD, MANIFEST, Artifact, open_artifact
from loftq.formats.disk import write_whole
from loftq.models.devices import compute_dtype, device_name, device_to_run
from loftq.models.merged import WITH_ADAPTER
from loftq.models.trained_folder import with_backbone
from loftq.planning.recipe import recipe_again
from loftq.settings import from_dict, option_name
from loftq.training.data import are_texts, read_rows
from loftq.training.evaluate_settings import EvaluateKeywords, EvaluateSettings
from loftq.training.model import find_model
from loftq.training.open_model import load_source, open_to_use
from loftq.training.opened import Opened
from loftq.training.process import explain_memory
from loftq.training.tasks import MEASURES, TRAINING_TASKS, require
from loftq.verbs.quantize import quantize

_PLAIN = {"method": "qlora", "scales": None, "rounding": None, "iters": None, "refine": None}
_TEXT = ("calibration", "calibration_tokens", "sequence_length")


@dataclass(frozen=True)
class Evaluation:
    """The figures of each measured model, by its name in the table (`rows`), and how they were measured.

    `about` names the model, the adapter, the device, the dtype and the versions.
    """

    task: str
    data: str
    rows: Mapping[str, Mapping[str, float]]
    notes: Sequence[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        figures = {"task": self.task, "data": self.data, "models": self.rows, "notes": list(self.notes)}
        return {**self.about, **figures}

    def table(self) -> str:
        """Return the figures as text for a person, with a line for each model."""
        return "\n".join([columns(self._cells(), numbers=True), *self.notes])

    def _cells(self) -> list[list[str]]:
        """The cells of the table: a heading, and a line for each model."""
        names = list(next(iter(self.rows.values())))
        return [["", *names]] + [[name, *(_shown(row[key]) for key in names)] for name, row in self.rows.items()]

    def section(self) -> str:
        """Return the table as a section of a model card, under a heading that names the task and the data."""
        heading, *models = self._cells()
        rows = "\n".join(
            f"| {' | '.join(map(markdown, line))} |" for line in (heading, ["---"] * len(heading), *models)
        )
        title = f"### {self.task}, {markdown(Path(self.data).name)}"
        return "\n\n".join([title, rows, *map(markdown, self.notes)]) + "\n"


def _shown(value: float) -> str:
    if float(value).is_integer() and abs(value) >= 1:
        return f"{value:.0f}"
    return f"{value:.4f}" if value < 1e4 else f"{value:.2e}"


def evaluate(model: str, **settings: Unpack[EvaluateKeywords]) -> Evaluation:
    """Measure a model on a task: an artifact with its own or a trained adapter, a full-precision or a merged model.

    `model` may also be the folder of a trained adapter, which knows its backbone.

    The keywords are the options of `loftq evaluate --help`, with underscores; `data` is required. With `compare` the
    table begins with the full-precision model (`source`, by default the one that the artifact was made from), its
    plain quantization by the same recipe, and the artifact with its initial adapter. With `card` the table is also
    written into the artifact's card. Raises LoftQError.
    """
    chosen = from_dict(EvaluateSettings, settings)
    model, adapter = with_backbone(str(model), chosen.adapter)
    chosen = replace(chosen, adapter=adapter)
    _check_use(model, chosen)
    device = device_to_run(chosen.cpu)
    dtype = compute_dtype(chosen.dtype, device)
    figures: dict[str, dict[str, float]] = {}
    with silenced_with_data(chosen.quiet), explain_memory():
        rows = read_rows(chosen.data)
        if chosen.max_examples is not None:
            rows = rows.select(range(min(chosen.max_examples, len(rows))))
        for name, open_model in _candidates(model, chosen, device, dtype):
            opened = open_model()
            require(MEASURES[chosen.task].like, opened.task.name, name, chosen.task)
            figures[name] = MEASURES[chosen.task].measure(opened, rows, chosen)
            del opened
    about = {
        "model": model,
        "adapter": adapter,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in VERSIONS},
    }
    evaluation = Evaluation(chosen.task, ", ".join(chosen.data), figures, _notes(chosen.task, figures), about)
    if chosen.card:
        _into_card(Path(model) / CARD, evaluation)
    return evaluation


def _check_use(model: str, settings: EvaluateSettings) -> None:
    """Raise OptionError for an unknown task, for a column or an option that the task does not use, and without data."""
    if settings.task not in MEASURES:
        raise UnknownNameError("task", settings.task, MEASURES)
    measure = MEASURES[settings.task]
    for name in settings.columns:
        if name not in TRAINING_TASKS[measure.like].roles:
            raise UnknownNameError("column", name, TRAINING_TASKS[measure.like].roles)
    for name in ("window", "stride", "max_windows", "max_new_tokens", "chat_template"):
        if name not in measure.options and getattr(settings, name) is not None:
            readers = " or ".join(reader for reader, row in MEASURES.items() if name in row.options)
            raise OptionError(
                f"{option_name(name)}: --task {settings.task} does not use it, leave it out (--task {readers} uses it)"
            )
    if settings.max_examples is not None and measure.joins_rows and are_texts(settings.data):
        raise OptionError(
            f"--max-examples {settings.max_examples}: a .txt file is one row, so it does not limit anything: use "
            "--max-windows"
        )
    if settings.source is not None and not settings.compare:
        raise OptionError(
            f"--source {settings.source}: applies only with --compare: add --compare, or leave --source out"
        )
    if settings.card and not (Path(model) / MANIFEST).is_file():
        raise OptionError(
            f"--card: {model} is not a folder that `loftq quantize` wrote, so it has no card to write into"
        )
    if not settings.data:
        raise OptionError("no data is given: name files or a data set with --data")


def _into_card(path: Path, evaluation: Evaluation) -> None:
    """Write the table at the end of a card, and remove an earlier one of the same task and data."""
    text = read_card(path)
    section = evaluation.section()
    heading = re.escape(section.partition("\n")[0])
    kept = re.sub(rf"\n{heading}\n.*?(?=\n#|\Z)", "", text, flags=re.DOTALL)
    write_whole(path, f"{kept.rstrip()}\n\n{section}")


Candidate = tuple[str, Callable[[], Opened]]


def _candidates(
    model: str, settings: EvaluateSettings, device: torch.device, dtype: torch.dtype
) -> Iterator[Candidate]:
    """Yield the name of each model to measure, and a function that opens it."""
    adapter, quiet, offload = settings.adapter, settings.quiet, settings.offload
    backbone = find_model(model)
    artifact = backbone if isinstance(backbone, Artifact) else None
    if settings.compare:
        if artifact is None or artifact.manifest["kind"] not in WITH_ADAPTER:
            raise OptionError(
                f"--compare: {model} was not written by `loftq quantize`, so there is nothing to compare it with"
            )
        origin = settings.source or str(artifact.manifest["source"]["model"])
        yield "full precision", lambda: load_source(origin, artifact, device, dtype)
        with tempfile.TemporaryDirectory() as folder:
            yield (
                "plain quantization",
                lambda: _plain(artifact, origin, Path(folder) / "plain", device, dtype, offload, quiet=quiet),
            )
        yield "start", lambda: open_to_use(backbone, None, device, dtype, offload)
        if adapter is None:
            return
    started = artifact is not None and artifact.manifest["kind"] in WITH_ADAPTER
    name = "trained" if adapter is not None else "start" if started else "model"
    yield name, lambda: open_to_use(backbone, adapter, device, dtype, offload)


def _plain(
    artifact: Artifact,
    source: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    offload: str | None,
    *,
    quiet: bool,
) -> Opened:
    """Quantize with the same recipe, but to the nearest codes and with an adapter that adds nothing, as QLoRA does."""
    recipe: Any = recipe_again(artifact.manifest["recipe"]).to_dict() | _PLAIN | dict.fromkeys(_TEXT)
    quantize(source, output=folder, quiet=quiet, **recipe)
    return open_to_use(open_artifact(folder), None, device, dtype, offload)


def _notes(task: str, figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    note = MEASURES[task].note
    return [note] if note is not None and len(figures) > 1 else []
