"""Files that appear whole or not at all. Oracle: what a reader finds at every moment, and the process's umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loftq.errors import OutputError
from loftq.formats.disk import is_inside, move_into_place, replacing, scratch_beside, write_whole


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
        ("", False),
        (".", False),
        ("..\\config.json", False),
        ("C:\\config.json", False),
        ("\\\\server\\config.json", False),
        ("config.json\0", False),
    ],
)
def test_names_that_leave_the_folder(name: str, inside: bool) -> None:
    assert is_inside(name) is inside


def test_a_file_that_is_made_anew_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    """As safetensors does it, whose files only their owner can read."""
    before = os.umask(0o002)
    try:
        with replacing(tmp_path / "x.safetensors") as scratch:
            save_file({"a": torch.zeros(2)}, scratch)
        with scratch_beside(tmp_path / "known") as scratch:
            save_file({"a": torch.zeros(2)}, scratch / "moment.safetensors")
            move_into_place(scratch, tmp_path / "known")
    finally:
        os.umask(before)
    for name in ("x.safetensors", "known/moment.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o664
    assert stat.S_IMODE((tmp_path / "known").stat().st_mode) == 0o775


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Neither through one that has the temporary name, nor through one in the place of the file."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in (".card.md.partial", "card.md"):
        (tmp_path / name).symlink_to(precious)
    write_whole(tmp_path / "card.md", "new")
    assert (precious.read_text(), (tmp_path / "card.md").read_text()) == ("precious", "new")
    assert not (tmp_path / "card.md").is_symlink()


@pytest.mark.parametrize("name", ["known", ".known-partial"])
def test_a_scratch_folder_is_not_a_link(name: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("precious")
    (tmp_path / name).symlink_to(tmp_path / "home")
    with pytest.raises(OutputError, match=f"{name} is a symbolic link"), scratch_beside(tmp_path / "known"):
        pass
    assert (tmp_path / "home" / "precious").read_text() == "precious"


@pytest.mark.parametrize("target", ["home", "home/precious", "missing"])
def test_a_scratch_folder_with_links_is_emptied_and_not_continued(target: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("precious")
    (tmp_path / ".known-partial").mkdir()
    (tmp_path / ".known-partial" / "progress").write_text("{}")
    (tmp_path / ".known-partial" / "state").symlink_to(tmp_path / target)
    with scratch_beside(tmp_path / "known", "progress") as scratch:
        assert list(scratch.iterdir()) == []
    assert (tmp_path / "home" / "precious").read_text() == "precious"
