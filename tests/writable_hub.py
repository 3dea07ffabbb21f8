"""A Hub that can be written: users with tokens, and what a client asks for to create, upload, commit, branch and tag.

Large files go the way of Git LFS. What is committed is a folder, so that the reading half serves it as any other.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hub import REPO, Answer, Hub, RefusalError, Repo, Request, json_answer

SETTLED = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}  # what a new repository holds


@dataclass
class User:
    """Whose token it is, what it may do, and for whom."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass
class Upload:
    """What was put. After `breaks_after` of them the Hub fails, once `meanwhile` has run."""

    objects: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    breaks_after: int | None = None
    meanwhile: Callable[[], object] | None = None


class WritableHub(Hub):
    """A Hub with users, whose commits are made under `root`."""

    routes: ClassVar = [
        ("GET", r"/api/whoami-v2", "_whoami"),
        ("POST", r"/api/repos/create", "_create"),
        ("POST", r"/api/validate-yaml", "_validate"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "_preupload"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "_put"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "_commit"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "_branch"),
        ("POST", rf"/api/models/{REPO}/tag/(?P<revision>[^/]+)", "_tag"),
        ("GET", rf"/api/models/{REPO}/refs", "_refs"),
        *Hub.routes,
    ]

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.users: dict[str, User] = {}
        self.upload = Upload()
        self.forbidden: set[str] = set()  # repositories that nobody may write
        self.tags: dict[str, set[str]] = {}

    def join(self, token: str, name: str, role: str = "write", orgs: tuple[str, ...] = ()) -> None:
        """Add a user with a token."""
        self.users[token] = User(name, role, orgs)
        self.tokens.add(token)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        found = self.repos[repo]
        folder = found.commits[found.refs.get(revision, revision)]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    def _user(self, request: Request) -> User:
        if request.token not in self.users:
            raise RefusalError(401, "", "Invalid username or password.")
        return self.users[request.token]

    def _writable(self, request: Request, name: str, *, propose: bool = False) -> Repo:
        """A repository for one who may write it, or for a pull request one who may read it."""
        user, repo = self._user(request), self.repos.get(name)
        mine = name.partition("/")[0] in (user.name, *user.orgs)
        if repo is None or (repo.private and not mine):
            raise RefusalError(404, "RepoNotFound", "Repository not found")
        if not propose and (not mine or user.role == "read" or name in self.forbidden):
            raise RefusalError(403, "", "you do not have write permission on this repository")
        return repo

    def _whoami(self, request: Request) -> Answer:
        user = self._user(request)
        token = {"displayName": "test", "role": user.role}
        orgs = [{"name": name} for name in user.orgs]
        return json_answer({"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": token}})

    def _create(self, request: Request) -> Answer:
        user, asked = self._user(request), json.loads(request.body)
        owner = asked["organization"] or user.name
        name = f"{owner}/{asked['name']}"
        if user.role == "read" or owner not in (user.name, *user.orgs) or name in self.forbidden:
            raise RefusalError(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        if name in self.repos:
            raise RefusalError(409, "", "You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repos[name] = Repo(private, token=request.token)
        self._add(name, SETTLED, "main")
        return json_answer({"url": f"{self.endpoint}/{name}"})

    def _validate(self, request: Request) -> Answer:
        content = json.loads(request.body)["content"]
        if not content.startswith("---\n"):
            return json_answer({"errors": [{"message": "no metadata"}]}, 400)
        return json_answer({"errors": [], "warnings": []})

    def _preupload(self, request: Request, repo: str, revision: str) -> Answer:
        found = self._writable(request, repo, propose="create_pr" in request.path)
        if found.refs.get(revision, revision) not in found.commits:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        held = self.files(repo, revision)
        answers = []
        for file in json.loads(request.body)["files"]:
            large = file["path"].endswith(".safetensors")
            there = held.get(file["path"])
            oid = None if there is None else hashlib.sha256(there).hexdigest() if large else _git_hash(there)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return json_answer({"files": answers})

    def _batch(self, request: Request, repo: str) -> Answer:
        self._writable(request, repo, propose=True)
        objects = []
        for wanted in json.loads(request.body)["objects"]:
            put = {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}?X-Signature=secret"}}
            objects.append(wanted if wanted["oid"] in self.upload.objects else {**wanted, "actions": put})
        return json_answer({"transfer": "basic", "objects": objects})

    def _put(self, request: Request, oid: str) -> Answer:
        if self.upload.breaks_after is not None and len(self.upload.puts) >= self.upload.breaks_after:
            if self.upload.meanwhile is not None:
                self.upload.meanwhile()
            return Answer(500, {})
        self.upload.puts.append(oid)
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise RefusalError(400, "", "the content is another")
        self.upload.objects[oid] = request.body
        return json_answer({})

    def _commit(self, request: Request, repo: str, revision: str) -> Answer:
        propose = "create_pr" in request.path
        found = self._writable(request, repo, propose=propose)
        if revision not in found.refs:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = self.files(repo, revision)
        for line in request.body.splitlines():
            self._apply(files, json.loads(line))
        ref = f"refs/pr/{len(found.commits)}" if propose else revision
        commit = self._add(repo, files, ref)
        url = f"{self.endpoint}/{repo}"
        pull = {"pullRequestUrl": f"{url}/discussions/{ref.rpartition('/')[2]}"} if propose else {}
        return json_answer({"commitUrl": f"{url}/commit/{commit}", "commitOid": commit, **pull})

    def _apply(self, files: dict[str, bytes], line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = self.upload.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]

    def _add(self, repo: str, files: dict[str, bytes], ref: str) -> str:
        """A commit of these files."""
        found = self.repos[repo]
        folder = self.root / repo / str(len(found.commits))
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return found.commit(folder, ref)

    def _branch(self, request: Request, repo: str, branch: str) -> Answer:
        found = self._writable(request, repo)
        if branch in found.refs:
            raise RefusalError(409, "", "Reference already exists")
        found.refs[branch] = found.refs["main"]
        return json_answer({})

    def _tag(self, request: Request, repo: str, revision: str) -> Answer:
        found, tag = self._writable(request, repo), json.loads(request.body)["tag"]
        if tag in found.refs:
            raise RefusalError(409, "", "Tag reference exists already")
        found.refs[tag] = found.refs.get(revision, revision)
        self.tags.setdefault(repo, set()).add(tag)
        return json_answer({})

    def _refs(self, request: Request, repo: str) -> Answer:
        self._open(request, repo, "main", content=False)
        tags, refs = self.tags.get(repo, set()), self.repos[repo].refs
        rows = [{"name": n, "ref": f"refs/{n}", "targetCommit": commit} for n, commit in refs.items()]
        return json_answer(
            {
                "branches": [row for row in rows if row["name"] not in tags],
                "tags": [row for row in rows if row["name"] in tags],
                "converts": [],
            }
        )


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
