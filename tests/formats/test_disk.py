"""Files that appear whole or not at all. Oracle: what a reader finds at every moment, and the process's umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from loftq.formats.disk import is_inside, replacing, write_whole


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_is_replaced_at_once(umask: int, mode: int, tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    path.write_text("old")
    before = os.umask(umask)
    try:
        with replacing(path) as scratch:
            scratch.write_text("new")
            assert scratch.parent == tmp_path
            assert path.read_text() == "old"
    finally:
        os.umask(before)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as scratch:
            scratch.write_text("a part")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """The leftover may even be a link to somebody else's file: that is not written through."""
    mine, path = tmp_path / "mine", tmp_path / "card.md"
    mine.write_text("mine")
    with replacing(path) as scratch:
        left = scratch
    path.unlink()
    left.symlink_to(mine)
    write_whole(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n"
    assert mine.read_text() == "mine"
    write_whole(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert sorted(tmp_path.iterdir()) == [path, mine]


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("config.json", True),
        ("loftq_init/adapter_config.json", True),
        ("a..b/..c", True),
        ("../config.json", False),
        ("loftq_init/../../x", False),
        ("/etc/passwd", False),
        ("..", False),
    ],
)
def test_names_that_leave_the_folder(name: str, inside: bool) -> None:
    assert is_inside(name) is inside
