"""Symbolic links. Oracles: what the system finds behind a path; the cache as the Hub's client lays it out."""

from __future__ import annotations

from pathlib import Path

import pytest

from loftq.errors import ArtifactError, CheckpointError
from loftq.formats.links import linked_part, links_below, refuse_links, refuse_outside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (tmp_path / "model" / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (tmp_path / "model" / name).write_text("a")
    return tmp_path / "model"


def test_a_folder_without_links(folder: Path) -> None:
    refuse_links(folder, ["a", "sub/b", "missing", "sub/missing/x"], ArtifactError)
    refuse_outside(folder, ["a", "sub/b", "missing"])
    assert list(links_below(folder)) == []


@pytest.mark.parametrize(
    ("link", "target", "name", "outside"),
    [
        ("x", "../outside/secret", "x", True),
        ("x", "/proc/self/environ", "x", True),
        ("x", "../outside/missing", "x", True),
        ("x", "a", "x", False),
        ("x", "sub/../a", "x", False),
        ("x", "x", "x", False),  # a circle
        ("sub/x", "../../outside/secret", "sub/x", True),
        ("d", "../outside", "d/secret", True),
        ("d", "sub", "d/b", False),
        ("d", "/", "d/etc/passwd", True),
    ],
)
def test_links(link: str, target: str, name: str, outside: bool, folder: Path) -> None:
    (folder / link).symlink_to(target)
    assert linked_part(folder, name) == folder / link
    assert list(links_below(folder)) == [link]
    with pytest.raises(ArtifactError, match=f"{link} is a symbolic link to {target}"):
        refuse_links(folder, ["a", name], ArtifactError)
    if outside:
        with pytest.raises(CheckpointError, match="lies outside the model's folder"):
            refuse_outside(folder, ["a", name])
    else:
        refuse_outside(folder, ["a", name])


def test_a_chain_of_links_counts_by_its_end(folder: Path) -> None:
    (folder / "x").symlink_to("y")
    (folder / "y").symlink_to("../outside/secret")
    with pytest.raises(CheckpointError, match="outside/secret"):
        refuse_outside(folder, ["x"])


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "named").symlink_to(folder)
    refuse_links(tmp_path / "named", ["a", "sub/b"], ArtifactError)
    refuse_outside(tmp_path / "named", ["a", "sub/b"])


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A commit in the Hub's cache with a file, and one that is in the store that all repositories share."""
    cache = tmp_path / "hub"
    commit = cache / "models--user--model" / "snapshots" / "0123"
    for path in (commit / "sub", cache / "models--user--model" / "blobs", cache / "blobs" / "ab"):
        path.mkdir(parents=True)
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1")
    (cache / "blobs" / "ab" / "abcd").write_text("shared")
    (cache / "models--user--model" / "blobs" / "etag").write_text("content")
    (cache / "models--user--model" / "blobs" / "large").symlink_to("../../blobs/ab/abcd")
    (commit / "config.json").symlink_to("../../blobs/etag")
    (commit / "model.safetensors").symlink_to("../../blobs/large")
    (commit / "sub" / "config.json").symlink_to("../../../blobs/etag")
    return commit


@pytest.mark.parametrize("inner", ["", "sub"])
def test_links_of_the_hubs_cache_are_files(inner: str, snapshot: Path) -> None:
    names = ["config.json"] if inner else ["config.json", "model.safetensors", "sub/config.json"]
    refuse_links(snapshot / inner, names, ArtifactError)
    refuse_outside(snapshot / inner, names)
    assert list(links_below(snapshot / inner)) == []


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../outside", "../../refs/main", "../../blobs/planted"])
def test_other_links_in_the_cache_are_links(target: str, snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    (snapshot.parents[1] / "blobs" / "planted").symlink_to(tmp_path / "outside")
    (snapshot / "x").symlink_to(target)
    with pytest.raises(ArtifactError, match="x is a symbolic link"):
        refuse_links(snapshot, ["x"], ArtifactError)
    with pytest.raises(CheckpointError, match="x is a symbolic link"):
        refuse_outside(snapshot, ["x"])


def test_a_folder_that_only_looks_like_a_snapshot(tmp_path: Path) -> None:
    """Its `blobs` leads to somebody's files."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text("secret")
    folder = tmp_path / "given" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (tmp_path / "given" / "blobs").symlink_to(tmp_path / "home")
    (folder / "x").symlink_to("../../blobs/secret")
    with pytest.raises(CheckpointError, match="home/secret"):
        refuse_outside(folder, ["x"])
