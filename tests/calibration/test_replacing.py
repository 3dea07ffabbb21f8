"""Statistics of runs that are killed, interrupted or run side by side. The oracle is what lies on the disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, local
from typing import Any

import pytest

from loftq.calibration import forward, windows
from loftq.calibration import gather as gathering
from loftq.calibration.gather import gather
from loftq.calibration.windows import prepare
from loftq.formats.disk import move_into_place, scratch_beside
from loftq.hub.source import find_source
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of


@pytest.fixture(scope="module")
def plan(pico: Path) -> Plan:
    return make_plan(find_source(str(pico)), recipe_of(rank=4))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MIN_TOKENS", 256)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _be_killed(folder: Path) -> None:
    with scratch_beside(folder, "progress") as scratch:
        (scratch / "moment").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_be_killed, args=(tmp_path / "known",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == [".known-partial"]
    with scratch_beside(tmp_path / "known", "progress") as scratch:
        assert names(scratch) == []
        (scratch / "moment").write_text("whole")
        move_into_place(scratch, tmp_path / "known")
    assert names(tmp_path) == ["known"]


def test_what_can_be_gone_on_with_stays(tmp_path: Path) -> None:
    for found in ([], ["moment", "progress"]):
        with scratch_beside(tmp_path / "known", "progress") as scratch:
            assert names(scratch) == found
            (scratch / "moment").write_text("half")
            (scratch / "progress").write_text("so far")
    with scratch_beside(tmp_path / "known", "progress") as scratch:
        (scratch / "progress").unlink()
    assert names(tmp_path) == []


def test_an_interrupted_run_leaves_nothing(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        assert names(tmp_path) == [".known-partial"]
        raise KeyboardInterrupt

    monkeypatch.setattr(gathering, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gather(plan, prepare(plan, tokens=512, sequence_length=64), tmp_path / "known", quiet=True)
    assert names(tmp_path) == []


def test_of_runs_side_by_side_one_gathers(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: how often the model runs; both have its statistics."""
    calibration = prepare(plan, tokens=512, sequence_length=64)
    both, seen, runs, known, run = Barrier(2), local(), [], gathering._complete_statistics, forward.run_in_lockstep

    def look(*arguments: Any) -> Any:
        """Neither begins until both have found nothing."""
        found = known(*arguments)
        if not hasattr(seen, "once"):
            seen.once = both.wait(60)
        return found

    def count(*arguments: Any) -> Any:
        runs.append(1)
        return run(*arguments)

    monkeypatch.setattr(gathering, "_complete_statistics", look)
    monkeypatch.setattr(forward, "run_in_lockstep", count)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(gather, plan, calibration, tmp_path / "known", quiet=True) for _ in range(2)]
        found = [future.result() for future in asked]
    assert len(runs) == 1
    assert found[0].record == found[1].record
    assert names(tmp_path) == ["known"]
