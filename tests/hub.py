"""A Hub on this machine, for the real clients, huggingface_hub and datasets: folders over HTTP, every request recorded.

It answers what reading a model or a data set asks for: its information, its tree, and its files, whole or by
Range, with the headers and the error codes by which a client tells one refusal from another. A commit is a folder,
served as it is; branches and tags name commits. A data set's name begins with `datasets/`, as it does in an address.
A further verb is a row of `Hub.routes` and a method, which gets the request and the named groups of its pattern.

It is also the proxy of whoever is pointed at it: what a client asks of another host arrives here, and is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, constants
from huggingface_hub.utils import close_session

REPO = r"(?P<repo>(?:datasets/)?[\w.-]+(?:/[\w.-]+)?)"
API = rf"/api/(?:models/|(?=datasets/)){REPO}"
REVISION = r"(?P<revision>[^/]+)"


class Request(NamedTuple):
    """What a client sent."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def token(self) -> str:
        """Who asks, or nobody."""
        return self.headers.get("authorization", "").removeprefix("Bearer ")


class Answer(NamedTuple):
    """What it gets: with `cut`, the connection breaks after so many bytes of the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    cut: int | None = None


@dataclass
class Repo:
    """A repository. A private one does not exist for strangers; a gated one shows its files' names only."""

    private: bool = False
    gated: bool = False
    token: str = ""  # what opens it where it is private or gated
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag to commit
    commits: dict[str, Path] = field(default_factory=dict)

    def commit(self, folder: Path, *refs: str) -> str:
        """Add a folder as a commit and let branches and tags name it. Returns its hash."""
        commit = hashlib.sha1(f"{folder} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = folder
        self.refs |= dict.fromkeys(refs, commit)
        return commit


class RefusalError(Exception):
    """A refusal as the Hub words it: the client reads the code first, then the status."""

    def __init__(self, status: int, code: str, message: str) -> None:
        named = {"X-Error-Code": code} if code else {}
        self.answer = json_answer({"error": message}, status, {"X-Error-Message": message, **named})


class Hub:
    """The repositories, the tokens that are anybody's, and what was asked for so far."""

    routes: ClassVar = [
        ("GET", rf"{API}(?:/revision/{REVISION})?", "_info"),
        ("GET", rf"{API}/tree/{REVISION}/?(?P<folder>.*)", "_tree"),
        ("GET|HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<file>.+)", "_file"),
    ]

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        self.requests: list[Request] = []
        self.cut: dict[str, int] = {}  # file to the number of bytes after which its connection breaks
        self.endpoint = ""

    def add(self, name: str, folder: Path, *, private: bool = False, gated: bool = False, token: str = "") -> str:
        """Add a repository with one commit on main. Returns the commit's hash."""
        self.repos[name] = Repo(private, gated, token)
        self.tokens |= {token} - {""}
        return self.repos[name].commit(folder, "main")

    def answer(self, request: Request) -> Answer:
        """Record a request, find its route, and run it."""
        self.requests.append(request)
        try:
            if request.token and request.token not in self.tokens:
                raise RefusalError(401, "", "Invalid credentials in Authorization header")
            for method, pattern, action in self.routes:
                found = re.fullmatch(pattern, urlsplit(request.path).path)
                if found and re.fullmatch(method, request.method):
                    parts = {name: unquote(part) for name, part in found.groupdict("main").items()}
                    answer: Answer = getattr(self, action)(request, **parts)
                    return answer
            raise RefusalError(404, "", "Not found")
        except RefusalError as refusal:
            return refusal.answer

    def _open(self, request: Request, name: str, revision: str, *, content: bool) -> tuple[str, dict[str, Path]]:
        """A commit and its files, for whoever may see them."""
        repo, token = self.repos.get(name), request.token
        if repo is None or (repo.private and token != repo.token):
            raise RefusalError(404 if token else 401, "RepoNotFound", "Repository not found")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if content and repo.gated and token != repo.token:
            raise RefusalError(403 if token else 401, "GatedRepo", f"Access to {name} is restricted")
        folder = repo.commits[commit]
        return commit, {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}

    def _info(self, request: Request, repo: str, revision: str) -> Answer:
        commit, files = self._open(request, repo, revision, content=False)
        private = self.repos[repo].private
        siblings = [{"rfilename": file} for file in files]
        name = repo.removeprefix("datasets/")
        return json_answer({"id": name, "sha": commit, "private": private, "siblings": siblings})

    def _tree(self, request: Request, repo: str, revision: str, folder: str) -> Answer:
        commit, files = self._open(request, repo, revision, content=False)
        found: dict[PurePosixPath, dict[str, object]] = {}
        for file, path in files.items():
            for above in PurePosixPath(file).parents[:-1]:
                found[above] = {"type": "directory", "path": str(above), "size": 0, "oid": commit}
            whole = path.read_bytes()
            found[PurePosixPath(file)] = {"type": "file", "path": file, "size": len(whole), "oid": _hash(whole)}
        top = PurePosixPath(folder)
        if folder and found.get(top, {}).get("type") != "directory":
            raise RefusalError(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        deep = parse_qs(urlsplit(request.path).query).get("recursive") == ["true"]
        return json_answer([e for path, e in found.items() if top in (path.parents if deep else path.parents[:1])])

    def _file(self, request: Request, repo: str, revision: str, file: str) -> Answer:
        commit, files = self._open(request, repo, revision, content=True)
        if file not in files:
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        whole = files[file].read_bytes()
        headers = {"ETag": f'"{_hash(whole)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if not asked:
            return Answer(200, headers, whole, self.cut.get(file))
        start, end = int(asked[1]), min(int(asked[2] or len(whole)), len(whole) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(whole)}"
        return Answer(206, headers, whole[start : end + 1], self.cut.get(file))


def json_answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """A JSON value as an answer."""
    return Answer(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port of this machine. A connection carries one request, so none outlives the server."""

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = hub.answer(Request(self.command, self.path, headers, body))
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            with suppress(ConnectionError):  # whoever asked may be gone
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: answer.cut])

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = handle_one  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def client_of(endpoint: str, home: Path) -> Iterator[None]:
    """Point huggingface_hub, which reads its environment once on import, at a Hub and at an empty home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")  # of two spellings, the small letters count
        for scheme in ("http", "https"):
            patch.setenv(f"{scheme}_proxy", endpoint)
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name, place in {
            "HF_HOME": "",
            "HF_HUB_CACHE": "hub",
            "HF_XET_CACHE": "xet",
            "HF_TOKEN_PATH": "token",
            "HF_STORED_TOKENS_PATH": "stored_tokens",
            "AGENT_HARNESSES_PATH": "harnesses.json",
        }.items():
            patch.setattr(constants, name, str(home / place), raising=False)
        patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        close_session()  # the client's connections, and the proxies it found when it was made
        HfFileSystem.clear_instance_cache()  # what it found before it got a token
        try:
            yield
        finally:
            close_session()


@contextmanager
def datasets_of(endpoint: str, home: Path) -> Iterator[None]:
    """Point the datasets library, which does the same, and the client below it.

    Only the store that counts its downloads has an address of its own, and the viewer's is derived: the name
    `datasets-server` is put before the Hub's. Both are other hosts, and come to the Hub as to a proxy.
    """
    from datasets import config

    with client_of(endpoint, home), pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_ENDPOINT", endpoint)
        patch.setattr(config, "HUB_DATASETS_URL", endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}")
        patch.setattr(config, "HF_DATASETS_CACHE", home / "datasets")
        patch.setattr(config, "DOWNLOADED_DATASETS_PATH", home / "datasets" / "downloads")
        patch.setattr(config, "EXTRACTED_DATASETS_PATH", home / "datasets" / "downloads" / "extracted")
        yield
