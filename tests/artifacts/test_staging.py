"""The journal of an unfinished run. Oracle: its lines, written out by hand, of today's kinds and of an older one.

Covers: loftq/artifacts/journal.py, loftq/artifacts/written.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loftq.artifacts import staging as module
from loftq.artifacts.staging import Staging, check_output, open_staging
from loftq.errors import OutputError
from loftq.formats.artifact import MANIFEST
from loftq.formats.checkpoint import TensorSpec, lay_out

FINGERPRINT = {"recipe": {"bits": 4}}
RECORD = {"refine_steps": 3, "divergence_before": 0.5, "divergence": 0.25, "errors": {"q_proj": {"error": 0.1}}}
JOURNALS: dict[str, list[dict[str, Any]]] = {
    "today's": [{"tensor": "a", "row": 1}, {"distilled": RECORD}, {"ready": True}],
    "older": [{"tensor": "a", "row": 1}, {"tensor": "(distilled)", **RECORD}, {"ready": True}],
}


def _write(output: Path, records: list[dict[str, Any]]) -> Path:
    path = output / ".loftq-partial" / "journal.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in [{"fingerprint": FINGERPRINT}, *records]))
    return path


@pytest.mark.parametrize("age", JOURNALS)
def test_a_journal_says_that_the_adapter_is_distilled(age: str, tmp_path: Path) -> None:
    records = JOURNALS[age]
    for count in range(1, len(records) + 1):
        output = tmp_path / str(count)
        path = _write(output, records[:count])
        before = path.read_text()
        with open_staging(output, FINGERPRINT, overwrite=False) as staging:
            assert staging.done == {"a": {"row": 1}}
            assert staging.distilled == (RECORD if count > 1 else None)
            assert staging.ready is (count > 2)
        assert path.read_text() == before


def test_what_is_noted_is_read_again(tmp_path: Path) -> None:
    with open_staging(tmp_path / "out", FINGERPRINT, overwrite=False) as staging:
        assert (staging.done, staging.distilled, staging.ready) == ({}, None, False)
        staging.note("a", {"row": 1})
        staging.note_distilled(RECORD)
        assert staging.distilled == RECORD
    path = tmp_path / "out" / ".loftq-partial" / "journal.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"fingerprint": FINGERPRINT},
        *JOURNALS["today's"][:2],
    ]
    with open_staging(tmp_path / "out", FINGERPRINT, overwrite=False) as staging:
        assert (staging.done, staging.distilled) == ({"a": {"row": 1}}, RECORD)
    with pytest.raises(OutputError, match=r"holds an unfinished run \(1 tensors done\)"):
        check_output(tmp_path / "out", resume=False, overwrite=False)


SPECS = [TensorSpec("a", torch.float32, (4, 4)), TensorSpec("b", torch.float32, (8,))]


def _run(output: Path, change: Callable[[Staging], object] = lambda _: None) -> Staging:
    """A run of two steps. Before its folder is called finished, `change` gets the partial one."""
    with open_staging(output, FINGERPRINT, overwrite=False) as staging:
        with staging.writing(lay_out([SPECS], 10**9)) as writer:
            for spec in SPECS:
                if spec.name not in staging.done:
                    digest = writer.write(spec.name, torch.ones(spec.shape))
                    staging.note(spec.name, {"written": {spec.name: digest}})
        staging.write_text("config.json", "{}")
        change(staging)
        staging.write_text(MANIFEST, json.dumps({"files": staging.describe().files}))
        staging.publish()
    return staging


def test_only_what_was_planned_is_moved(tmp_path: Path) -> None:
    _run(tmp_path / "out", lambda staging: (staging.folder / "stray.txt").write_text("of another program"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", MANIFEST, "model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["gone", "zeros", "cut short", "longer"])
def test_a_planned_file_that_is_not_what_was_written(name: str, damage: str, tmp_path: Path) -> None:
    """It is an error before the folder is called finished, and the next run makes it whole."""

    def change(staging: Staging) -> None:
        path = staging.folder / name
        content = path.read_bytes()
        path.write_bytes({"zeros": bytes(len(content)), "cut short": content[:-1]}.get(damage, content + b"x"))
        if damage == "gone":
            path.unlink()

    with pytest.raises(OutputError, match=rf"{name} does not hold what this run wrote .*: run again with --resume"):
        _run(tmp_path / "out", change)
    assert not (tmp_path / "out" / MANIFEST).exists()
    _run(tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["b"], torch.ones(8))
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_steps_of_a_journal_without_hashes_are_done_again(tmp_path: Path) -> None:
    _write(tmp_path / "out", [{"tensor": "a", "row": 1}])
    staging = _run(tmp_path / "out")
    assert set(staging.done) == {"a", "b"}
    assert "row" not in staging.done["a"]


def _run_on_after_failures(output: Path) -> None:
    """Steps of several workers: one fails, the others end."""
    with (
        open_staging(output, FINGERPRINT, overwrite=False) as staging,
        staging.writing(lay_out([SPECS], 10**9)) as writer,
    ):
        for spec in SPECS:
            digest = writer.write(spec.name, torch.ones(spec.shape))
            with contextlib.suppress(OSError):
                staging.note(spec.name, {"written": {spec.name: digest}})


def test_nothing_is_noted_after_the_disk_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed sync the next one succeeds, though bytes are lost: the kernel forgets which."""
    monkeypatch.setattr(module, "EVERY", 0)
    syncs = iter([OSError(errno.EIO, "lost"), OSError(errno.EIO, "lost")])

    def once_failing(_: int) -> None:
        if (error := next(syncs, None)) is not None:
            raise error

    monkeypatch.setattr(os, "fdatasync", once_failing)
    with pytest.raises(OutputError, match="input/output error"):
        _run(tmp_path / "out")
    with pytest.raises(OutputError, match="input/output error"):
        _run_on_after_failures(tmp_path / "out")
    lines = (tmp_path / "out" / ".loftq-partial" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"fingerprint": FINGERPRINT}]
