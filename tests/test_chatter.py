"""As a library loftq prints nothing, logs under its own name, and leaves the settings of other libraries as they were.

Oracles: the two standard streams; the state of the loggers and progress bars of transformers and datasets.

Covers: cli/notices.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers.utils import logging as transformers

import loftq
from loftq.chatter import silenced, silenced_with_data

NAMES = ("transformers", "bitsandbytes")


def state() -> tuple[Any, ...]:
    levels = [logging.getLogger(name).level for name in NAMES]
    return (*levels, transformers.is_progress_bar_enabled(), datasets.are_progress_bars_disabled())


@pytest.fixture
def _talkative() -> Iterator[None]:
    """The libraries as a program finds them, whatever tests before have changed."""
    before = state()
    logging.getLogger("transformers").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    transformers.enable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.enable_progress_bars()
    yield
    for name, level in zip(NAMES, before, strict=False):
        logging.getLogger(name).setLevel(level)
    if not before[2]:
        transformers.disable_progress_bar()  # type: ignore[no-untyped-call]
    if before[3]:
        datasets.disable_progress_bars()


@pytest.mark.usefixtures("_talkative")
def test_calls_print_nothing_and_restore_the_libraries(
    pico: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = state()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n' * 6)
    (tmp_path / "text.txt").write_text("A text to measure. " * 20)
    folder = loftq.quantize(str(pico), output=tmp_path / "out", rank=2, iters=1).folder
    loftq.load_qlora(folder)
    with caplog.at_level(logging.INFO, "loftq"):
        loftq.train(folder, data=str(rows), output=tmp_path / "trained", max_steps=1, dtype="float32", cpu=True)
    loftq.evaluate(str(folder), data=str(tmp_path / "text.txt"), cpu=True)
    loftq.verify(folder)
    loftq.merge(folder, to="bf16", output=tmp_path / "merged")
    assert capfd.readouterr() == ("", "")
    assert state() == before
    said = [record for record in caplog.records if record.name.startswith("loftq.")]
    assert any("parameters train" in record.getMessage() for record in said)


@pytest.mark.usefixtures("_talkative")
def test_libraries_are_restored_after_an_error() -> None:
    before = state()
    for silent in (silenced, silenced_with_data):
        with silent():
            assert not transformers.is_progress_bar_enabled()
            assert all(logging.getLogger(name).level == logging.ERROR for name in NAMES)
        assert state() == before
        with pytest.raises(ZeroDivisionError), silent():
            _ = 1 / 0
        assert state() == before


def test_a_command_shows_what_is_logged(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def say(*_: object, **__: object) -> list[Path]:
        logging.getLogger("loftq.verbs").info("a notice \x1b[31m")
        logging.getLogger("loftq.verbs").warning("a warning")
        return []

    monkeypatch.setattr("loftq.verbs.report.report", say)
    assert run("report", "folder").stderr == "a notice \\x1b[31m\na warning\n"
    handlers = logging.getLogger("loftq").handlers
    assert [type(handler).__name__ for handler in handlers if not type(handler).__module__.startswith("_pytest")] == [
        "NullHandler"
    ]
