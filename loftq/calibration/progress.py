"""How far a calibration has come, on disk: one that is cut off goes on from there when it is asked for again.

After a block, at most once a minute, what it returned for each batch is written, with a record of what is known by
then. A run that goes on gives the model these outputs in place of that block's, and NaN in place of those before it: a
model that passes anything on from them gives answers that are not numbers, and is run from the beginning.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from loftq.formats.disk import write_whole

PROGRESS = "progress.json"
_EVERY = 60.0  # seconds


class Progress:
    """What an earlier run of the same `identity` has left in a folder, and what this one leaves.

    `rounds` have been served (`lockstep.run`), which left `modules` with their files and counts, `files` numbered so
    far, and the `digests` of tensors.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder, self._identity = folder, json.loads(json.dumps(identity))
        self._kept: set[int] = set()  # batches of the present round
        self._due, self._last = False, time.monotonic()
        self._lost: dict[int, Any] = {}
        self._turn = 0  # which of two sets of states counts
        self.rounds, self.files = 0, 0
        self.modules: dict[str, dict[str, Any]] = {}
        self.digests: dict[str, str] = {}
        found = self._read()
        if found:
            self._turn, self.rounds, self.files = (found[key] for key in ("turn", "rounds", "files"))
            self.modules, self.digests = found["modules"], found["digests"]
        else:
            self._remove("*")

    def output(self, index: int) -> Any:
        """What the last round's block returned for a batch."""
        return torch.load(self._state(self._turn, index), weights_only=True)

    def lost(self, index: int) -> Any:
        """The like of it, of NaN: what an earlier block returned is known no more."""
        if index not in self._lost:
            self._lost[index] = _mapped(self.output(index), _nothing)
        return self._lost[index]

    def begin(self) -> None:
        """A block has its turn."""
        self._due = time.monotonic() - self._last >= _EVERY
        self._kept.clear()

    def keep(self, index: int, output: Any) -> None:
        """Write what the block returned for a batch, where it is time to."""
        if not self._due or not _is_plain(output):
            return
        try:
            torch.save(_mapped(output, torch.clone), self._state(1 - self._turn, index))
            self._kept.add(index)
        except (OSError, RuntimeError):  # no room: the run goes on without
            self._due, self._last = False, math.inf
            self._remove(f"state-{1 - self._turn}-*")

    def end(
        self, rounds: int, batches: int, modules: Mapping[str, Any], digests: Mapping[str, str], files: int
    ) -> None:
        """The block has had all `batches`: what is kept takes the place of what was."""
        if not self._due or len(self._kept) < batches:
            return
        self._turn = 1 - self._turn
        record = {"identity": self._identity, "rounds": rounds, "turn": self._turn, "batches": batches}
        record |= {"modules": dict(modules), "digests": dict(digests), "files": files}
        write_whole(self._folder / PROGRESS, json.dumps(record))
        self._last = time.monotonic()

    def finish(self) -> None:
        """Leave nothing of it."""
        self._remove(f"*{PROGRESS}*")  # and what a killed run was about to put in its place
        self._remove("state-*")

    def forget(self) -> None:
        """Leave nothing at all: another begins anew."""
        self._remove("*")

    def _remove(self, names: str) -> None:
        for path in self._folder.glob(names):
            path.unlink()

    def _state(self, turn: int, index: int) -> Path:
        return self._folder / f"state-{turn}-{index:05d}.pt"

    def _read(self) -> dict[str, Any]:
        """The record, where it is of the same calibration and all its files are there."""
        try:
            found = dict(json.loads((self._folder / PROGRESS).read_text(encoding="utf-8")))
            wanted = {self._folder / row["file"] for row in found["modules"].values()}
            wanted |= {self._state(found["turn"], index) for index in range(found["batches"])}
            known = found["identity"] == self._identity and all(path.is_file() for path in wanted)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return found if known else {}


def _nothing(tensor: torch.Tensor) -> torch.Tensor:
    value = torch.nan if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A block's output with all of its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(part, change) for part in value)
    return {key: _mapped(part, change) for key, part in value.items()} if isinstance(value, dict) else value


def _is_plain(value: Any) -> bool:
    """Whether it can be read back without running anything."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(part) for key, part in value.items())
    return value is None or type(value) in (torch.Tensor, bool, int, float, str)
