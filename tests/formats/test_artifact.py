"""Opening a folder of ours: complete or an error that says what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import described

import loftq
from loftq.errors import ArtifactError
from loftq.formats import artifact
from loftq.formats.artifact import combine_hashes, open_artifact


@pytest.fixture(scope="module")
def whole(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact as it is written. Do not write to it."""
    output = tmp_path_factory.mktemp("artifact") / "whole"
    return loftq.quantize(str(pico), rank=4, iters=0, max_shard_size="60KB", output=output, quiet=True).folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "loftq.json").read_text())
    edit(manifest)
    (folder / "loftq.json").write_text(json.dumps(manifest))


def test_a_complete_folder_opens(whole: Path) -> None:
    for name in (whole, str(whole)):
        opened = open_artifact(name)
        assert opened.folder == whole
        assert opened.adapter == whole / "loftq_init"
        assert opened.manifest == json.loads((whole / "loftq.json").read_text())
        assert opened.backbone_hash == opened.manifest["backbone_sha256"]


def test_manifest_lists_every_file_with_its_size_and_hash(whole: Path) -> None:
    """Oracle: the files themselves."""
    found = {path.relative_to(whole).as_posix(): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    del found["loftq.json"]
    expected = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in found.items()
    }
    manifest = open_artifact(whole).manifest
    assert manifest["files"] == expected
    assert described(whole, expected) == expected
    shards = {name: entry["sha256"] for name, entry in expected.items() if name.startswith("model-")}
    assert len(shards) > 1
    assert manifest["backbone_sha256"] == combine_hashes(shards)


def test_a_file_is_not_a_folder(whole: Path, tmp_path: Path) -> None:
    for path in (whole / "loftq.json", tmp_path / "nothing"):
        with pytest.raises(ArtifactError, match=f"{path} is not a folder: expected one that `loftq quantize` wrote"):
            open_artifact(path)


def test_a_folder_without_manifest_may_have_been_interrupted(folder: Path, pico: Path) -> None:
    (folder / "loftq.json").unlink()
    for path in (folder, pico):
        with pytest.raises(ArtifactError, match=rf"{path} has no loftq\.json: .*--resume"):
            open_artifact(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"format_version": 1}', b'{"format_version": 1, "fi', b"\xff\xfe\x00"],
)
def test_a_damaged_manifest_is_named(content: bytes, folder: Path) -> None:
    (folder / "loftq.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{folder}/loftq\.json is damaged \("):
        open_artifact(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"format_version": "one"},
        {"format_version": None},
        {"files": []},
        {"files": {"model-00001-of-00003.safetensors": {}}},
        {"files": {"model-00001-of-00003.safetensors": 5}},
        {"files": {"model-00001-of-00003.safetensors": {"bytes": "many"}}},
    ],
)
def test_a_manifest_with_a_wrong_entry_is_damaged(wrong: dict[str, Any], folder: Path) -> None:
    change(folder, lambda manifest: manifest.update(wrong))
    with pytest.raises(ArtifactError, match=rf"{folder}/loftq\.json is damaged \("):
        open_artifact(folder)


@pytest.mark.parametrize("name", ["format_version", "files", "kind", "recipe", "backbone_sha256"])
def test_a_manifest_that_lacks_an_entry_is_damaged(name: str, folder: Path) -> None:
    change(folder, lambda manifest: manifest.pop(name))
    with pytest.raises(
        ArtifactError, match=rf"{folder}/loftq\.json is damaged \({name} is missing, expected .*\): copy or download"
    ):
        open_artifact(folder)


def test_a_newer_version_asks_for_an_upgrade_whatever_else_it_holds(folder: Path) -> None:
    newer = {"format_version": artifact.VERSION + 1, "files": ["in another form"]}
    (folder / "loftq.json").write_text(json.dumps(newer))
    message = (
        rf"format version {artifact.VERSION + 1}, this loftq reads up to version {artifact.VERSION}: upgrade loftq"
    )
    with pytest.raises(ArtifactError, match=message):
        open_artifact(folder)


@pytest.mark.parametrize("name", ["config.json", "README.md", "loftq_init/adapter_model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{folder}/{name} is missing: loftq\.json lists it"):
        open_artifact(folder)


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "loftq_init/adapter_model.safetensors"])
@pytest.mark.parametrize("difference", [-1, 1])
def test_weights_of_another_size_are_named(name: str, difference: int, folder: Path) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes((content + b"\x00")[: len(content) + difference])
    message = f"{folder}/{name} has {len(content) + difference} bytes, expected {len(content)}"
    with pytest.raises(ArtifactError, match=message):
        open_artifact(folder)


def test_small_files_may_be_edited_and_others_added(folder: Path) -> None:
    """A card or a generation config is the user's to change; only weights must be as they were."""
    (folder / "README.md").write_text("my own card")
    (folder / "notes.txt").write_text("mine")
    open_artifact(folder)


def test_combined_hash_depends_on_names_and_values_and_not_on_order() -> None:
    parts = {"a": "1", "b": "2"}
    assert combine_hashes(parts) == combine_hashes(dict(reversed(parts.items())))
    assert combine_hashes(parts) == hashlib.sha256(b"a 1\nb 2\n").hexdigest()
    assert len({combine_hashes(other) for other in (parts, {"a": "2", "b": "1"}, {"a": "1"}, {})}) == 4
