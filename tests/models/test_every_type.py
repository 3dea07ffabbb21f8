"""Every model type that transformers builds from a small config is quantized, or refused in one line."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import save_model
from small_models import small_model
from transformers import CONFIG_MAPPING

import loftq
from loftq.errors import LoftQError
from loftq.models.tasks import TASKS, auto_class

SECONDS = 20  # for a type; some are built from hundreds of layers that no size makes small
LARGEST = 4_000_000  # weights
TEXT: dict[str, Any] = {"calibration": "default", "calibration_tokens": 4096, "sequence_length": 64, "refine": 0}
OPTIONS: dict[str, Any] = {"rank": 8, "iters": 1, "quiet": True}
PARTS = 8


class _TooLongError(BaseException):
    """Ends what takes longer than its time."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def quantize(kind: str, folder: Path) -> str | None:
    """What happened to a type: "quantized", "refused", the traceback of another error; None if there is no model."""
    task = next((task for task, row in TASKS.items() if CONFIG_MAPPING[kind] in auto_class(row)._model_mapping), None)
    if task is None:
        return None
    try:
        model = small_model(kind, task)
        if model.num_parameters() > LARGEST:
            return None
        source = save_model(model, folder / "source")
    except Exception:  # of transformers, for a config that is not made for it
        return None
    outcome = "quantized"
    for name, calibration in (("calibrated", TEXT), ("plain", {})):
        try:
            loftq.quantize(str(source), output=folder / name, task=task, **calibration, **OPTIONS)
        except LoftQError as error:
            if len(str(error).splitlines()) > 1:
                return f"{kind}: {error}"
            outcome = "refused"
        except Exception:
            return f"{kind}: {traceback.format_exc(limit=-4)}"
        else:
            break
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.filterwarnings("ignore")
def test_every_type_is_quantized_or_refused_in_one_line(part: int, tmp_path: Path) -> None:
    """Oracle: the class of the error."""
    outcomes: dict[str, str | None] = {}
    for kind in sorted(CONFIG_MAPPING)[part::PARTS]:
        try:
            with time_limit(SECONDS):
                outcomes[kind] = quantize(kind, tmp_path / kind)
        except _TooLongError:
            outcomes[kind] = None
    found = [outcome for outcome in outcomes.values() if outcome is not None]
    assert len(found) > 40
    assert [outcome for outcome in found if outcome not in ("quantized", "refused")] == []
