"""What calibration knows of a model, on disk: a folder that is written once and read a layer at a time.

`calibration.json` is written last. It says of which model, text and settings the folder is, and which file holds
the moment of each module's inputs; modules that get the same inputs share a file. `teacher.safetensors` holds what
the model answered: the windows as `input_ids`, and the greatest log-probabilities at each position with their
tokens, `values` and `indices`, or where a model has no vocabulary its `hidden` states.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from loftq.calibration.windows import Calibration
from loftq.core.moments import PANEL, assemble
from loftq.errors import ArtifactError, OptionError
from loftq.formats.checkpoint import Checkpoint
from loftq.planning.plan import Layer, Plan

RECORD = "calibration.json"
TEACHER = "teacher.safetensors"
VERSION = 2
AGAIN = "remove the folder to gather them again, or name another with --statistics"
_SOURCE = dict.fromkeys(("name", "headers_sha256", "config_sha256"), str)
_SETTINGS = {
    **dict.fromkeys(("tokens", "sequence_length", "seed"), int),
    **dict.fromkeys(("task", "text_sha256", "tokenizer_sha256", "windows_sha256"), str),
}
_VOLATILE = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")  # of a config: no part of the model


@dataclass(frozen=True)
class Statistics:
    """Second moments of each layer's inputs, and a model's answers. Thread-safe."""

    folder: Path
    record: dict[str, Any]
    sizes: Mapping[str, int]  # inputs of each module

    @property
    def tokens(self) -> int:
        """How many tokens the model was calibrated on."""
        return int(self.record["settings"]["tokens"])

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, a line each."""
        return tuple(self.record["notes"])

    @property
    def settings(self) -> dict[str, Any]:
        """Of the calibration: tokens, sequence length, seed, and hashes of text, tokenizer and windows."""
        return dict(self.record["settings"])

    def count(self, module: str) -> int:
        """How many vectors a module got: 0 where it was never reached."""
        return int(self.record["modules"].get(module, {}).get("count", 0))

    def moment(self, module: str) -> torch.Tensor | None:
        """H (in, in) of a module's inputs in float32, or None for one that was never reached. Raises ArtifactError."""
        if not self.count(module):
            return None
        path = self.folder / self.record["modules"][module]["file"]
        panels, size = read_panels(path), self.sizes[module]
        expected = [(min(PANEL, size - start), size - start) for start in range(0, size, PANEL)]
        if [tuple(panel.shape) for panel in panels] != expected:
            raise ArtifactError(f"{path} is damaged (no moment of {size} inputs, which {module} has): {AGAIN}")
        if not all(panel.dtype == torch.float32 and bool(torch.isfinite(panel).all()) for panel in panels):
            raise ArtifactError(f"{path} is damaged (not finite, or not of float32): {AGAIN}")
        return assemble(panels)

    def check_weight(self, layer: Layer, digest: str) -> None:
        """Raise ArtifactError unless a layer's tensor, by its SHA-256, is the one that the model was run with."""
        if self.record["weights"].get(layer.tensor) != digest:
            raise ArtifactError(f"{self.folder} was gathered with another {layer.tensor}: {AGAIN}")

    def teacher(self) -> dict[str, torch.Tensor]:
        """What the model answered, by name: `input_ids` int32 (windows, length), for seq2seq `decoder_input_ids`, and
        `values` float16 and `indices` int32 (windows, length, k), or `hidden` bfloat16 (windows, length, hidden size).

        Raises ArtifactError.
        """
        path = self.folder / TEACHER
        found = _load(path)
        answers = {name for name in found if not name.endswith("_ids")}
        shape = (self.tokens // self.settings["sequence_length"], self.settings["sequence_length"])
        if "input_ids" not in found or answers not in ({"values", "indices"}, {"hidden"}):
            raise ArtifactError(f"{path} is damaged (it holds {', '.join(found) or 'nothing'}): {AGAIN}")
        if any(tensor.shape[:2] != shape for tensor in found.values()):
            raise ArtifactError(f"{path} is damaged (not of {shape[0]} windows of {shape[1]} tokens): {AGAIN}")
        return found


def open_statistics(folder: Path, plan: Plan, calibration: Calibration | None = None) -> Statistics:
    """Open a folder of statistics that belong to a plan's model and task, and to a calibration where one is given.

    Raises ArtifactError for one that is damaged, of another model, tokenizer or text, or lacks a layer of the plan;
    OptionError for one of another task, number of tokens, sequence length or seed.
    """
    found = read_record(folder)
    if found["source"]["headers_sha256"] != headers_digest(plan.source.checkpoint):
        raise ArtifactError(
            f"{folder} was gathered with {found['source']['name']}, whose tensors are not those of "
            f"{plan.source.name}: {AGAIN}"
        )
    if found["source"]["config_sha256"] != config_digest(plan.source.folder):
        raise ArtifactError(f"{folder} was gathered with another config.json than that of {plan.source.name}: {AGAIN}")
    task = found["settings"]["task"]
    if task != plan.task.name:
        raise OptionError(f"{folder} was gathered with --task {task}, not {plan.task.name}: {AGAIN}")
    if calibration is not None:
        _check_settings(folder, found["settings"], calibration.settings)
    lacking = lacks(found, plan)
    if lacking:
        raise ArtifactError(f"{folder} has no statistics of {lacking[0]}: {AGAIN}")
    return Statistics(folder, found, {layer.module: layer.shape[1] for layer in plan.layers})


def lacks(record: dict[str, Any], plan: Plan) -> list[str]:
    """The modules of a plan of which a record knows nothing."""
    return [layer.module for layer in plan.layers if layer.module not in record["modules"]]


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder of statistics, with all that is read of it. Raises ArtifactError."""
    path = folder / RECORD
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
        version = record["version"]
        if version == VERSION:
            _check_record(record)
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} has no {RECORD}: expected a folder of calibration statistics") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r}): {AGAIN}") from error
    if version != VERSION:
        raise ArtifactError(f"{path} is of version {version}, and this is for version {VERSION}: {AGAIN}")
    return record


def _check_record(record: dict[str, Any]) -> None:
    """Raise KeyError or TypeError where a record lacks something, or has it of another type."""
    rows: list[tuple[Mapping[str, Any], Mapping[str, type]]] = [
        (record, {"notes": list, "weights": dict}),
        (record["source"], _SOURCE),
        (record["settings"], _SETTINGS),
    ]
    for row in record["modules"].values():
        rows.append((row, {"count": int, "file": str if row["count"] else object}))
    for row, kinds in rows:
        for key, kind in kinds.items():
            if not isinstance(row[key], kind):
                raise TypeError(f"{key} is {row[key]!r}")


def headers_digest(checkpoint: Checkpoint) -> str:
    """A hash of the names, dtypes and shapes of all tensors."""
    rows = sorted((spec.name, str(spec.dtype), list(spec.shape)) for spec in checkpoint.tensors.values())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def config_digest(folder: Path) -> str:
    """A hash of what a model's `config.json` says of what it computes."""
    text = (folder / "config.json").read_text(encoding="utf-8")
    config = json.loads(text, object_hook=lambda row: {k: v for k, v in row.items() if k not in _VOLATILE})
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def read_panels(path: Path) -> Sequence[torch.Tensor]:
    """The panels of a moment."""
    panels = _load(path)
    names = [str(i) for i in range(len(panels))]
    if not names or set(panels) != set(names):
        raise ArtifactError(f"{path} is damaged (it holds {', '.join(panels) or 'nothing'}): {AGAIN}")
    return [panels[name] for name in names]


def _check_settings(folder: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    for key in ("tokens", "sequence_length", "seed"):
        if found[key] != asked[key]:
            raise OptionError(f"{folder} was gathered with {key} {found[key]}, not {asked[key]}: {AGAIN}")
    for key, what in (("tokenizer_sha256", "tokenizer"), ("text_sha256", "text"), ("windows_sha256", "text")):
        if found[key] != asked[key]:
            raise ArtifactError(f"{folder} was gathered with another {what}: {AGAIN}")


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}): {AGAIN}") from error
