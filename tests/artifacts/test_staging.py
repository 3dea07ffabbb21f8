"""The journal of an unfinished run. Oracle: its lines, written out by hand, of today's kinds and of an older one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loftq.artifacts.staging import check_output, open_staging
from loftq.errors import OutputError

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
