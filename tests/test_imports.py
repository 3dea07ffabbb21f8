"""Imports run one way: errors <- core <- formats <- models <- pipeline, training <- cli."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"errors": 0, "core": 1, "formats": 2, "models": 3, "pipeline": 4, "training": 4, "cli": 5}
CORE_MAY_IMPORT = {"torch", "numpy", "scipy", "numba", "triton", "loftq"}
FILES = sorted([*(ROOT / "loftq").glob("*/**/*.py"), *(ROOT / "cli").glob("*.py")])


def imports_of(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(ROOT / "loftq").parts[0] if path.is_relative_to(ROOT / "loftq") else "cli"
    for name in imports_of(path):
        if name.startswith("loftq."):
            assert ROOMS[name.split(".")[1]] <= ROOMS[room], f"{path.name} in {room} imports {name}"
        if name.startswith("loftq_cli"):
            assert room == "cli", f"{path.name} imports {name}"
        if room == "core" and not (ROOT / "loftq" / "core" / name).exists():
            standard = name.split(".")[0] in __import__("sys").stdlib_module_names
            assert standard or name.split(".")[0] in CORE_MAY_IMPORT, f"core imports {name}"
