"""Downloads that are compared with their etags. Oracle: a Hub that sends other bytes of the same length than it names.

The etags are those of the Hub: SHA-256, or the object name that git computes.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Answer, Hub, Request, client_of, serve

from loftq.errors import SourceError
from loftq.hub import snapshot
from loftq.hub.repository import open_repository
from loftq.hub.source import fetch_all, find_source


class DamagedHub(Hub):
    """Sends some files with one bit changed. With `git`, etags are those of files that are not large."""

    def __init__(self) -> None:
        super().__init__()
        self.damaged: set[str] = set()
        self.git = False

    def _file(self, request: Request, repo: str, revision: str, file: str) -> Answer:
        answer = super()._file(request, repo, revision, file)
        headers = dict(answer.headers)
        if self.git:
            content = self.repos[repo].commits[headers["X-Repo-Commit"]].joinpath(file).read_bytes()
            headers["ETag"] = f'"{git_hash(content)}"'
        body = bytes([*answer.body[:-1], answer.body[-1] ^ 1]) if file in self.damaged else answer.body
        return answer._replace(headers=headers, body=body)


def git_hash(content: bytes) -> str:
    return (
        subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True)
        .stdout.decode()
        .strip()
    )


@pytest.fixture
def hub(pico: Path, tmp_path: Path) -> Iterator[DamagedHub]:
    with serve(DamagedHub()) as served, client_of(served.endpoint, tmp_path / "hf"):
        served.add("user/model", pico)
        yield served


@pytest.mark.parametrize("git", [False, True])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_download_is_refused_and_downloaded_again(name: str, git: bool, hub: DamagedHub, pico: Path) -> None:
    hub.damaged, hub.git = {name}, git
    for _ in range(2):
        with pytest.raises(SourceError, match=f"{name} of user/model differs from its hash on the Hub, [0-9a-f]+: the"):
            find_source("user/model")
    hub.damaged = set()
    folder = find_source("user/model").folder
    assert (folder / name).read_bytes() == (pico / name).read_bytes()


def test_headers_and_other_readers_refuse_it_too(hub: DamagedHub, pico: Path, tmp_path: Path) -> None:
    hub.damaged = {"config.json"}
    with pytest.raises(SourceError, match=r"config.json of user/model differs"):
        find_source("user/model", headers_only=True)
    with pytest.raises(SourceError, match=r"config.json of user/model differs"):
        open_repository("user/model", None, None, ["config.json"])
    folder = Path(shutil.copytree(pico, tmp_path / "repository"))
    (folder / "extra.dat").write_bytes(b"what nobody but fetch_all downloads")
    hub.add("user/other", folder)
    hub.damaged = {"extra.dat"}
    source = find_source("user/other")
    with pytest.raises(SourceError, match=r"extra.dat of user/other differs"):
        fetch_all(source)
    hub.damaged = set()
    assert (fetch_all(source) / "extra.dat").read_bytes() == (folder / "extra.dat").read_bytes()


def test_a_file_that_was_damaged_in_the_cache_stays_for_its_owner(hub: DamagedHub) -> None:
    blob = (find_source("user/model").folder / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-4] + b"lost")
    with pytest.raises(SourceError, match=f"remove {blob} and run the same command again"):
        find_source("user/model")
    hub.endpoint, address = "http://127.0.0.1:9", hub.endpoint
    with client_of(hub.endpoint, blob.parents[3]), pytest.raises(SourceError, match=f"remove {blob}"):
        find_source("user/model")
    assert blob.is_file()
    blob.unlink()
    with client_of(address, blob.parents[3]):
        find_source("user/model")


@pytest.mark.usefixtures("hub")
def test_a_large_file_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, large = [], 10_000
    monkeypatch.setattr(snapshot, "_LARGE", large)
    monkeypatch.setattr(snapshot, "_has_hash", lambda *a, old=snapshot._has_hash: hashed.append(a[0]) or old(*a))
    for first in (True, False, False):
        hashed.clear()
        folder = find_source("user/model").folder
        blobs = {path.resolve() for path in folder.iterdir()}
        assert set(hashed) == {blob for blob in blobs if first or blob.stat().st_size < large}
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(SourceError, match=r"model.safetensors of user/model differs"):
        find_source("user/model")


def test_an_etag_of_another_form_is_believed(pico: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repo" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder.parents[1] / "blobs").mkdir()
    (folder.parents[1] / "blobs" / "mirror-1").write_bytes((pico / "config.json").read_bytes())
    (folder / "config.json").symlink_to("../../blobs/mirror-1")
    snapshot.check_hashes("user/model", folder, None)
