"""Imports run one way, floor by floor, and neither rooms nor files import each other in a circle."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("errors", "settings", "display", "secrets", "collector", "tables", "chatter"),
    ("core",),
    ("formats",),
    ("models", "hub"),
    ("planning",),
    ("calibration", "artifacts"),
    ("solving", "merging", "reporting"),
    ("cluster",),
    ("verbs",),
    ("training",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
CORE_MAY_IMPORT = {"torch", "numpy", "scipy", "numba", "triton", "loftq"}
FILES = sorted([*(ROOT / "loftq").rglob("*.py"), *(ROOT / "cli").glob("*.py")])
FRONT = [ROOT / "loftq" / "__init__.py", ROOT / "loftq" / "__main__.py"]  # the public names and the command line


def module_of(path: Path) -> str:
    """The dotted name of a file of `loftq/` or `cli/`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports anywhere: those of our own in full, also `from package import module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {f"cli.{node.module}"}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & MODULES.keys() or {node.module}
    return found


def room_of(module: str) -> str:
    """The room of one of our modules: `loftq.formats.gptq` lies in formats, `cli.train` in cli."""
    parts = module.split(".")
    return parts[1] if parts[0] == "loftq" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("path", [path for path in FILES if path not in FRONT], ids=module_of)
def test_imports_point_down(path: Path) -> None:
    room = room_of(module_of(path))
    for name in imports_of(path):
        if name.startswith("loftq."):
            assert FLOOR_OF[room_of(name)] <= FLOOR_OF[room], f"{path.name} in {room} imports {name}"
        if name.startswith("loftq_cli"):
            assert room == "cli", f"{path.name} imports {name}"
        if room == "core":
            first = name.split(".")[0]
            assert first in CORE_MAY_IMPORT or first in sys.stdlib_module_names, f"core imports {name}"


def test_no_circles() -> None:
    """Oracle: the standard library's topological sort, of files and of rooms."""
    files = {module: imports_of(path) & MODULES.keys() for module, path in MODULES.items() if path not in FRONT}
    rooms: dict[str, set[str]] = {}
    for module, names in files.items():
        others = {room_of(name) for name in names} - {room_of(module), "loftq"}
        rooms.setdefault(room_of(module), set()).update(others)
    for graph in (files, rooms):
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
