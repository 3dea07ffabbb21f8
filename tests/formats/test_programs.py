"""Files that can run code. Oracle: files of each kind, written by the programs that make them."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loftq.formats.programs import programs_below

MADE: dict[str, Callable[[Path], object]] = {
    "pytorch_model.bin": lambda path: torch.save({}, path),
    "renamed": lambda path: torch.save({}, path),
    "optimizer.PT": lambda path: path.write_bytes(b""),
    "sub/data.pkl": lambda path: path.write_bytes(pickle.dumps({})),
    "pickled.json": lambda path: path.write_bytes(pickle.dumps({})),
    "modeling_own.py": lambda path: path.write_text("1"),
    "library.so.1": lambda path: path.write_text("1"),
    "script": lambda path: path.write_text("#!/bin/sh\n"),
    "program": lambda path: path.write_bytes(Path(sys.executable).read_bytes()[:64]),
    "executable.txt": lambda path: (path.write_text("1"), path.chmod(0o744)),
}


@pytest.mark.parametrize("name", MADE)
def test_programs_and_pickles_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    MADE[name](tmp_path / name)
    assert list(programs_below(tmp_path)) == [name]


def test_the_files_of_a_model_are_not(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "link.bin").symlink_to(pico / "config.json")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert [*programs_below(pico), *programs_below(tmp_path)] == []
