"""Every target of `loftq merge` says all that belongs to it.

Covers: loftq/merging/target.py, loftq/merging/targets/__init__.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import loftq
from loftq.artifacts import serving
from loftq.artifacts.pair import open_pair
from loftq.errors import ArtifactError
from loftq.merging.settings import MergeRun, MergeSettings
from loftq.merging.targets import ROWS, TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_complete(name: str, run: Callable[..., Any]) -> None:
    """Oracle: the abstract methods of its class, and the lines of `loftq merge --help`."""
    target = TARGETS[name]
    assert not inspect.isabstract(target)
    assert target.name == name
    assert ROWS[name].text in run("merge", "--help").stdout
    assert target.tolerance is None or target.comparable
    assert name in serving._LINES


def test_an_adapter_of_another_backbone_is_for_dense_models_alone(pico: Path, tmp_path: Path) -> None:
    folder = loftq.quantize(str(pico), output=tmp_path / "out", rank=2, iters=1, quiet=True).folder
    pair = open_pair(folder, None)
    for target in TARGETS.values():
        assert not any("trained on" in note for note in target(pair, MergeSettings(), MergeRun()).notes())
    foreign = replace(pair, other_backbone="elsewhere")
    for name, target in TARGETS.items():
        if target.any_backbone:
            (note,) = target(foreign, MergeSettings(), MergeRun()).notes()
            assert "was trained on elsewhere" in note
        else:
            with pytest.raises(ArtifactError, match=rf"trained on elsewhere.* --to {name} into its own"):
                target(foreign, MergeSettings(), MergeRun()).notes()
