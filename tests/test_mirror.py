"""Tests lie in the folders of what they test: each file of the code has a test file of its name, or a theme covers it.

A test file whose name is not that of a file covers a theme. Its docstring then has a paragraph that begins with
`Covers:` and lists the files that the theme tests, separated by commas.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("loftq", "cli")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py"
)


def covered_by(path: Path) -> list[str]:
    """The source files that a test file's docstring lists."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    listed = re.search(r"^Covers: (.*?)(?:\n\n|\Z)", docstring, re.DOTALL | re.MULTILINE)
    return re.split(r",\s+", listed[1].strip().rstrip(".")) if listed else []


COVERED = {name: path for path in sorted((ROOT / "tests").rglob("test_*.py")) for name in covered_by(path)}


@pytest.mark.parametrize("source", SOURCES)
def test_every_file_has_its_tests(source: str) -> None:
    folder, _, name = source.removeprefix("loftq/").rpartition("/")
    assert (ROOT / "tests" / folder / f"test_{name}").is_file() or source in COVERED


@pytest.mark.parametrize("source", sorted(COVERED))
def test_what_a_theme_covers_exists(source: str) -> None:
    assert (ROOT / source).is_file(), f"{COVERED[source].name} lists a file that does not exist"
