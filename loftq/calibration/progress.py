"""The progress of a calibration on disk, from which an interrupted run continues.

After a block, at most once a minute, the output of the block for each batch is written, with a record of the results
so far. A run that continues uses these outputs instead of running that block, and NaN for the outputs of earlier
blocks. If a model uses any of those later, its answers become NaN, and it is run again from the beginning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from loftq.errors import ArtifactError
from loftq.formats.disk import sync, write_whole
from loftq.formats.scan import hash_of
from loftq.formats.schema import file_name, json_text, read_json, whole
from loftq.settings import plain

PROGRESS = "progress.json"
_EVERY = 60.0  # seconds
_SCHEMA = {
    "identity": dict,
    **dict.fromkeys(("rounds", "files"), whole()),
    "turn": whole(0, 1),
    "batches": whole(0, 10**6),
    "modules": {str: {"file": file_name, "count": whole()}},
    "digests": {str: str},
    "sha256": {str: str},
}


class Progress:
    """The progress that an earlier run of the same `identity` left in a folder, and that this run writes there.

    `due` says whether the outputs of the current block are written. `rounds` is the number of completed rounds
    (`lockstep.run`), `modules` the file and count of each module, `files` the number of files so far, and `digests` the
    hashes of the tensors that were read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder, self._identity = folder, plain(identity)
        self._kept: set[int] = set()  # batches of the current round whose output is written
        self.due, self._last = False, time.monotonic()
        self._lost: dict[int, Any] = {}
        self._turn = 0  # which of the two sets of state files is valid
        self.rounds, self.files = 0, 0
        self.modules: dict[str, dict[str, Any]] = {}
        self.digests: dict[str, str] = {}
        record = self._read()
        if record:
            self._turn, self.rounds, self.files = (record[key] for key in ("turn", "rounds", "files"))
            self.modules, self.digests = record["modules"], record["digests"]
        else:
            self._remove("*")

    def output(self, index: int) -> Any:
        """The output of the last completed round's block for a batch."""
        return torch.load(self._state(self._turn, index), weights_only=True)

    def lost(self, index: int) -> Any:
        """The same structure filled with NaN, in place of an earlier block's output, which is no longer known."""
        if index not in self._lost:
            self._lost[index] = filled_with_nan(self.output(index))
        return self._lost[index]

    def begin(self, due: bool | None = None) -> None:
        """Start a round: decide whether the outputs of its block are written, unless that is given."""
        self.due = self.is_time() if due is None else due
        self._kept.clear()

    def is_time(self) -> bool:
        """Whether the outputs of a block have not been written for a while."""
        return time.monotonic() - self._last >= _EVERY

    def keep(self, index: int, output: Any) -> None:
        """Write the output of the block for a batch, if this round is written."""
        if not self.due or not is_plain(output):
            return
        try:
            torch.save(mapped(output, torch.clone), self._state(1 - self._turn, index))
            sync(self._state(1 - self._turn, index))
            self._kept.add(index)
        except (OSError, RuntimeError):  # the disk is full: the run continues without writing its progress
            self.due, self._last = False, math.inf
            self._remove(f"state-{1 - self._turn}-*")

    def end(
        self, rounds: int, batches: int, modules: Mapping[str, Any], digests: Mapping[str, str], files: int
    ) -> None:
        """All `batches` have passed the block: the new outputs and record replace the older ones."""
        if not self.due or len(self._kept) < batches:
            return
        self._turn = 1 - self._turn
        record = {"identity": self._identity, "rounds": rounds, "turn": self._turn, "batches": batches}
        record |= {"modules": dict(modules), "digests": dict(digests), "files": files}
        hashes = {path.name: hash_of(path) for path in self._needed_files(record)}
        write_whole(self._folder / PROGRESS, json_text({**record, "sha256": hashes}))
        self._last = time.monotonic()

    def finish(self) -> None:
        """Remove the files of the progress, but not the results."""
        self._remove(f"*{PROGRESS}*")  # including the temporary file of a killed run
        self._remove("state-*")

    def forget(self) -> None:
        """Remove everything, so that the next run starts from the beginning."""
        self._remove("*")

    def _remove(self, names: str) -> None:
        for path in self._folder.glob(names):
            path.unlink()

    def _state(self, turn: int, index: int) -> Path:
        return self._folder / f"state-{turn}-{index:05d}.pt"

    def _needed_files(self, record: Mapping[str, Any]) -> set[Path]:
        """The files from which a run continues."""
        moments = {self._folder / row["file"] for row in record["modules"].values()}
        return moments | {self._state(record["turn"], index) for index in range(record["batches"])}

    def _read(self) -> dict[str, Any]:
        """The record, if it is that of the same calibration and all its files have their hashes; else an empty one."""
        try:
            record: dict[str, Any] = read_json(self._folder / PROGRESS, _SCHEMA)
            hashes = record["sha256"]
            usable = record["identity"] == self._identity and all(
                hash_of(path) == hashes.get(path.name) for path in self._needed_files(record)
            )
        except (OSError, ArtifactError):
            return {}
        return record if usable else {}


def filled_with_nan(output: Any) -> Any:
    """The output of a block with NaN in place of all its values."""
    return mapped(output, _nan_like)


def _nan_like(tensor: torch.Tensor) -> torch.Tensor:
    value = torch.nan if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def mapped(value: Any, change: Callable[[Any], Any], kind: type = torch.Tensor) -> Any:
    """The output of a block with `change` applied to all of its tensors, or to all that is of another kind."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(part, change, kind) for part in value)
    return {key: mapped(part, change, kind) for key, part in value.items()} if isinstance(value, dict) else value


def is_plain(value: Any) -> bool:
    """Whether a value can be read back without running any code."""
    if type(value) in (tuple, list):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and is_plain(part) for key, part in value.items())
    return value is None or type(value) in (torch.Tensor, bool, int, float, str)
