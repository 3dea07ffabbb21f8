"""The checkpoints of a training, of which the last may be what a kill left of one."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from loftq.errors import ArtifactError
from loftq.formats.adapter import open_adapter

_PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")  # by torch.save: archives, whose index is at their end


def checkpoints(output: Path) -> list[Path]:
    """All of them, the newest first."""
    found = [path for path in output.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=_step, reverse=True)


def last_checkpoint(output: Path) -> Path | None:
    """The newest that is complete: with others a run would break off, or go on without its optimizer."""
    return next(filter(_is_complete, checkpoints(output)), None)


def give_up_after(last: Path | None, output: Path) -> None:
    """Remove what is newer than the checkpoint that a run goes on from, and say so on stderr."""
    newer = [path for path in checkpoints(output) if last is None or _step(path) > _step(last)]
    for path in newer:
        shutil.rmtree(path)
    if newer:
        names = ", ".join(path.name for path in reversed(newer))
        where = "begins again" if last is None else f"goes on from {last.name}"
        print(f"{output}: {names} was cut off while it was written: training {where}", file=sys.stderr, flush=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        open_adapter(checkpoint)
    except (OSError, ValueError, ArtifactError):
        return False
    return all(_are_archives(checkpoint.glob(pattern)) for pattern in _PICKLED)


def _are_archives(paths: Iterable[Path]) -> bool:
    found = list(paths)
    return bool(found) and all(map(zipfile.is_zipfile, found))
