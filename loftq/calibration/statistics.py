"""The statistics of a calibration on disk: a folder that is written once and read a layer at a time.

`calibration.json` is written last. It names the model, text and settings, and for each module the file with the moment
of its inputs; modules that get the same inputs share a file. Of fused experts, the file has the tokens themselves
(`routed_tokens`). `teacher.safetensors` holds the answers of the model: the
windows as `input_ids`, and at each position the largest log-probabilities (`values`) with their tokens (`indices`), or
the `hidden` states of a model that has no vocabulary.
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

from loftq.calibration.routed_tokens import RoutedTokens
from loftq.calibration.windows import Calibration
from loftq.core.moments import assemble, panel_shapes
from loftq.errors import ArtifactError, OptionError
from loftq.formats.checkpoint import Checkpoint
from loftq.formats.links import refuse_links
from loftq.formats.model_config import read_config
from loftq.formats.scan import hash_of
from loftq.formats.schema import check_value, file_name, read_json, whole
from loftq.planning.plan import Plan

RECORD = "calibration.json"
TEACHER = "teacher.safetensors"
VERSION = 2
AGAIN = "remove the folder to gather the statistics again, or name another folder with --statistics"
_SCHEMA = {
    "source": dict.fromkeys(("name", "headers_sha256", "config_sha256"), str),
    "settings": {
        **dict.fromkeys(("tokens", "sequence_length"), whole(1)),
        "seed": whole(0, 2**63),
        **dict.fromkeys(("task", "text_sha256", "tokenizer_sha256", "windows_sha256"), str),
    },
    "modules": {str: {"count": whole(), "file": (file_name, None)}},
    "notes": [str],
    "weights": {str: str},
}
_VOLATILE = (
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
)  # entries of a config that do not affect the model's results


@dataclass(frozen=True)
class Statistics:
    """The second moment of each layer's inputs, and the answers of the model. Thread-safe."""

    folder: Path
    record: dict[str, Any]
    sizes: Mapping[str, int]  # number of inputs of each module

    @property
    def tokens(self) -> int:
        """Number of tokens that the model was calibrated on."""
        return int(self.record["settings"]["tokens"])

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user, one line each."""
        return tuple(self.record["notes"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the calibration: tokens, sequence length, seed, and hashes of text, tokenizer and windows."""
        return dict(self.record["settings"])

    def count(self, module: str) -> int:
        """Number of input vectors of a module: 0 if the text never reached it."""
        return int(self.record["modules"].get(module, {}).get("count", 0))

    def moment(self, module: str) -> torch.Tensor | None:
        """The moment H (in, in) of a module's inputs, float32; None if it was never reached. Raises ArtifactError."""
        if not self.count(module):
            return None
        path = self._checked(self.record["modules"][module]["file"])
        panels, size = read_panels(path), self.sizes[module]
        if [tuple(panel.shape) for panel in panels] != panel_shapes(size):
            raise ArtifactError(f"{path} is damaged (expected the moment of the {size} inputs of {module}): {AGAIN}")
        if not all(panel.dtype == torch.float32 and bool(torch.isfinite(panel).all()) for panel in panels):
            raise ArtifactError(f"{path} is damaged (expected finite float32 values): {AGAIN}")
        return assemble(panels)

    def routed(self, module: str) -> RoutedTokens | None:
        """The tokens of an experts module; None if the text never reached it. Raises ArtifactError."""
        if not self.count(module):
            return None
        path = self._checked(self.record["modules"][module]["file"])
        return RoutedTokens.read(path, self.sizes[module], AGAIN)

    def _checked(self, name: str) -> Path:
        """The path of a file that has the recorded hash. Older records have no hashes. Raises ArtifactError."""
        path, recorded = self.folder / name, self.record.get("sha256")
        expected = recorded.get(name) if isinstance(recorded, dict) else None
        if expected is not None and path.is_file() and hash_of(path) != expected:
            raise ArtifactError(f"{path} is damaged (SHA-256 mismatch): {AGAIN}")
        return path

    @property
    def has_answers(self) -> bool:
        """Whether the answers of the model were kept. Those to conversations with images are not."""
        return TEACHER in self.record.get("sha256", {TEACHER: None})

    def check_weights(self, module: str, digests: Mapping[str, str]) -> None:
        """Raise ArtifactError unless the SHA-256 of a module's tensors are those that the model was run with.

        Tensors of a module that the text never reached may not have been read: a vision tower's, for text alone.
        """
        recorded = self.record["weights"]
        for name, digest in digests.items():
            if recorded.get(name) != digest and (name in recorded or self.count(module)):
                raise ArtifactError(f"{self.folder} was gathered with a different {name}: {AGAIN}")

    def teacher(self) -> dict[str, torch.Tensor]:
        """The answers of the model and the tokens that they belong to, by name.

        `input_ids` int32 (windows, length), for seq2seq also `decoder_input_ids`; and either `values` float16 and
        `indices` int32 (windows, length, k), or `hidden` bfloat16 (windows, length, hidden size). Raises ArtifactError.
        """
        path = self._checked(TEACHER)
        tensors = _load(path)
        answers = {name for name in tensors if not name.endswith("_ids")}
        shape = (self.tokens // self.settings["sequence_length"], self.settings["sequence_length"])
        if "input_ids" not in tensors or answers not in ({"values", "indices"}, {"hidden"}):
            raise ArtifactError(f"{path} is damaged (it holds {', '.join(tensors) or 'nothing'}): {AGAIN}")
        if any(tensor.shape[:2] != shape for tensor in tensors.values()):
            raise ArtifactError(f"{path} is damaged (not of {shape[0]} windows of {shape[1]} tokens): {AGAIN}")
        return tensors


def open_statistics(folder: Path, plan: Plan, calibration: Calibration | None = None) -> Statistics:
    """Open a folder of statistics, and check that it matches the plan's model and task, and the calibration if given.

    Raises ArtifactError if the folder is damaged, if its model, tokenizer or text differs, or if it lacks a layer of
    the plan; OptionError if its task, number of tokens, sequence length or seed differs.
    """
    record = read_record(folder)
    if record["source"]["headers_sha256"] != headers_digest(plan.source.checkpoint):
        raise ArtifactError(
            f"{folder} was gathered with {record['source']['name']}, whose tensors differ from those of "
            f"{plan.source.name}: {AGAIN}"
        )
    if record["source"]["config_sha256"] != config_digest(plan.source.folder):
        raise ArtifactError(
            f"{folder} was gathered with a config.json that differs from that of {plan.source.name}: {AGAIN}"
        )
    task = record["settings"]["task"]
    if task != plan.task.name:
        raise OptionError(f"{folder} was gathered with --task {task}, not {plan.task.name}: {AGAIN}")
    if calibration is not None:
        _check_settings(folder, record["settings"], calibration.settings)
    missing = missing_modules(record, plan)
    if missing:
        raise ArtifactError(f"{folder} has no statistics of {missing[0]}: {AGAIN}")
    return Statistics(folder, record, plan.observed)


def missing_modules(record: dict[str, Any], plan: Plan) -> list[str]:
    """The modules of a plan that a record does not list."""
    return [module for module in plan.observed if module not in record["modules"]]


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder of statistics, with all entries that are used later. Raises ArtifactError."""
    path = folder / RECORD
    refuse_links(folder, [RECORD, TEACHER], ArtifactError)
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {RECORD}: expected a folder of calibration statistics")
    record: dict[str, Any] = read_json(path, {"version": int}, advice=AGAIN)
    if record["version"] != VERSION:
        raise ArtifactError(f"{path} has version {record['version']}, this loftq reads version {VERSION}: {AGAIN}")
    check_value(record, _SCHEMA, path, advice=AGAIN)
    for name, row in record["modules"].items():
        if row["count"]:
            check_value(row, {"file": file_name}, f"{path}: module {name!r}", advice=AGAIN)
    refuse_links(folder, [row["file"] for row in record["modules"].values() if row["count"]], ArtifactError)
    return record


def headers_digest(checkpoint: Checkpoint) -> str:
    """A hash of the names, dtypes and shapes of all tensors."""
    rows = sorted((spec.name, str(spec.dtype), list(spec.shape)) for spec in checkpoint.tensors.values())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def config_digest(folder: Path) -> str:
    """A hash of the entries of a model's `config.json` that affect its results."""
    return hashlib.sha256(json.dumps(_lasting(read_config(folder)), sort_keys=True).encode()).hexdigest()


def _lasting(value: Any) -> Any:
    """A part of a config without the entries that do not affect the model's results."""
    if isinstance(value, dict):
        return {key: _lasting(part) for key, part in value.items() if key not in _VOLATILE}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


def read_panels(path: Path) -> Sequence[torch.Tensor]:
    """The panels of a moment."""
    panels = _load(path)
    names = [str(i) for i in range(len(panels))]
    if not names or set(panels) != set(names):
        raise ArtifactError(f"{path} is damaged (it holds {', '.join(panels) or 'nothing'}): {AGAIN}")
    return [panels[name] for name in names]


def _check_settings(folder: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("tokens", "sequence_length", "seed"):
        if stored[key] != expected[key]:
            raise OptionError(f"{folder} was gathered with {key} {stored[key]}, not {expected[key]}: {AGAIN}")
    for key, what in (("tokenizer_sha256", "tokenizer"), ("text_sha256", "text"), ("windows_sha256", "text")):
        if stored[key] != expected[key]:
            raise ArtifactError(f"{folder} was gathered with a different {what}: {AGAIN}")


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}): {AGAIN}") from error
