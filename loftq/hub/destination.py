"""The repository that a folder is pushed to: who may write to it, what it holds, and the commit that changes it.

Everything that can be checked is checked before the first byte is sent: an invalid id, a token that may not write, a
name that is taken. Weights are then sent file by file, and a file that has arrived is not sent twice. A single commit
adds all files to the repository, so nobody ever loads a part of a model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loftq.display import few_of, one_line
from loftq.errors import ArtifactError, HubError, OptionError
from loftq.formats.artifact import MANIFEST
from loftq.formats.schema import check_value, read_json
from loftq.hub.errors import checked_token, explain_push_refusals
from loftq.hub.snapshot import download
from loftq.secrets import redacted

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_ACCOUNT = {  # what the Hub says about a token
    "name": str,
    "orgs?": ([{"name?": (str, None)}], None),
    "auth?": ({"accessToken?": ({"role?": (str, None)}, None)}, None),
}
_NOT_A_MODEL = {".gitattributes", "README.md", "LICENSE", ".gitignore"}  # files of a new repository


@dataclass(frozen=True)
class Destination:
    """A repository that can be written to or created, and the files that it holds at the revision."""

    api: HfApi
    repo_id: str
    private: bool
    revision: str | None  # a branch; None means main
    tag: str | None
    create_pr: bool
    exists: bool
    head: str | None  # the commit of the revision; None if the revision does not exist
    tagged: str | None  # the commit that the tag names already
    files: frozenset[str]  # files of the revision; of main if the branch is new

    @property
    def url(self) -> str:
        """The address of the repository's page."""
        return redacted(f"{self.api.endpoint}/{self.repo_id}")

    def refuse_other_models(self) -> None:
        """Raise HubError if the revision holds a model that loftq did not write: a push would mix the two."""
        model_files = self.files - _NOT_A_MODEL
        if model_files and MANIFEST not in model_files and self.head is not None and not self.create_pr:
            raise HubError(
                f"{self._place} holds another model ({few_of(sorted(model_files))}): name another repository, or "
                "name a new branch of this one with --revision, or open a pull request with --create-pr"
            )

    def stale(self, artifact: Mapping[str, Any], names: Collection[str], overwrite: bool) -> list[str]:
        """Return the files to delete when an artifact with this manifest and these file names is pushed.

        Raises HubError if the revision holds a model that loftq did not write. Without `overwrite`, also raises it for
        an artifact with another backbone, because adapters may have been trained on that backbone.
        """
        self.refuse_other_models()
        model_files = self.files - _NOT_A_MODEL
        if self.exists and self.head is None:  # a new branch begins as a copy of main, whose files it does not need
            return sorted(model_files - set(names))
        if MANIFEST not in model_files:
            return []
        manifest = self._manifest()
        if manifest.get("backbone_sha256") != artifact["backbone_sha256"] and not (overwrite or self.create_pr):
            raise HubError(
                f"{self._place} holds a loftq model with another backbone, and adapters that were trained on it need "
                "that backbone: add --overwrite to replace it, or name a new branch with --revision"
            )
        return sorted(model_files & set(manifest.get("files", ())) - set(names))

    def send(self, files: Mapping[str, Path | bytes], stale: Collection[str], message: str) -> CommitInfo:
        """Create the repository if it is new, send all files, and add them in a single commit. Raises HubError."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = {name: CommitOperationAdd(name, content) for name, content in files.items()}
        with explain_push_refusals(self.repo_id):
            if not self.exists:
                self.api.create_repo(self.repo_id, private=self.private or None)
            for name, addition in additions.items():
                if name.endswith((".safetensors", ".gguf")):
                    self.api.preupload_lfs_files(
                        self.repo_id,
                        [addition],
                        revision=None if self.head is None else self.revision,
                        create_pr=self.create_pr,
                        free_memory=False,
                    )
            if self.revision is not None and self.head is None:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            commit: CommitInfo = self.api.create_commit(
                self.repo_id,
                [*(CommitOperationDelete(name) for name in stale), *additions.values()],
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr,
            )
            self._add_tag(commit.oid)
        return commit

    def _add_tag(self, commit: str) -> None:
        if self.tag is None or self.tagged == commit:
            return
        if self.tagged is not None:
            raise HubError(f"the files were pushed as commit {commit}, but {self._taken_tag}")
        self.api.create_tag(self.repo_id, tag=self.tag, revision=commit)

    @property
    def _taken_tag(self) -> str:
        return f"--tag {self.tag} names another commit of {self.repo_id} ({self.tagged}): choose another tag"

    @property
    def _place(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}, revision {self.revision},"

    def _manifest(self) -> dict[str, Any]:
        with explain_push_refusals(self.repo_id):
            folder = download(self.repo_id, revision=self.head, token=cast(Any, self.api.token), patterns=[MANIFEST])
        try:
            manifest: dict[str, Any] = read_json(folder / MANIFEST, {"backbone_sha256?": str, "files?": {str: object}})
            return manifest
        except ArtifactError:  # a damaged manifest cannot have the same backbone
            return {}


def find_destination(
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> Destination:
    """Look up the repository that a push will write to or create.

    Raises OptionError for an invalid id, branch or tag. Raises HubError for everything that the Hub would refuse: no
    token, a token that may not write there, `private` for a public repository, a tag that names another commit.
    """
    from huggingface_hub import HfApi, get_token

    _check_names(repo_id, revision, tag, create_pr)
    token = checked_token(token)
    if token is None and get_token() is None:
        raise HubError(
            "no Hub token: log in with `hf auth login`, or pass --token "
            "(create one with write access at https://huggingface.co/settings/tokens)"
        )
    api = HfApi(token=token)
    with explain_push_refusals(repo_id):
        account = api.whoami()
        check_value(
            account, _ACCOUNT, "the answer of the Hub about the token", error=HubError, advice="try again later"
        )
        info, head = _look_up(api, repo_id, revision)
        tags = api.list_repo_refs(repo_id).tags if info is not None and tag is not None else []
    _check_owner(account, repo_id, info is not None, create_pr)
    if info is not None and private and not info.private:
        raise HubError(
            f"{repo_id} exists already and is public, and --private only applies to a new repository: "
            "make it private in its settings on the Hub, or name another repository"
        )
    destination = Destination(
        api=api,
        repo_id=repo_id,
        private=private,
        revision=revision,
        tag=tag,
        create_pr=create_pr,
        exists=info is not None,
        head=head,
        tagged=next((ref.target_commit for ref in tags if ref.name == tag), None),
        files=frozenset(file.rfilename for file in info.siblings or ()) if info is not None else frozenset(),
    )
    if destination.tagged is not None and destination.tagged != head:
        raise HubError(destination._taken_tag)
    return destination


def _check_names(repo_id: str, revision: str | None, tag: str | None, create_pr: bool) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OptionError(
            f"{repo_id!r} is not a valid repository id: {one_line(error)}: name it as USER/NAME"
        ) from error
    if "/" not in repo_id:
        raise OptionError(f"{repo_id!r} is not a valid repository id: name its owner too, as in USER/{repo_id}")
    for option, name in (("--revision", revision), ("--tag", tag)):
        if name is not None and not re.fullmatch(r"(?!.*(\.\.|//|\.lock$|[/.]$))\w[\w./-]*", name):
            raise OptionError(
                f"{option} {name}: not a valid git ref name: use letters, digits, '-', '_', '.' and '/', as in v1.0"
            )
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise OptionError(f"--revision {revision} is a commit, and a commit cannot be changed: name a branch")
    for option, name in (("--revision", revision), ("--tag", tag)):
        if create_pr and name is not None:
            raise OptionError(
                f"--create-pr and {option} exclude each other: leave {option} out, or push without --create-pr"
            )


def _look_up(api: HfApi, repo_id: str, revision: str | None) -> tuple[Any, str | None]:
    """Return the Hub's information on a repository and the commit of the revision. What does not exist is None."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        return api.model_info(repo_id), None
    except RepositoryNotFoundError:
        return None, None
    return info, info.sha


def _check_owner(account: Mapping[str, Any], repo_id: str, exists: bool, create_pr: bool) -> None:
    """Raise HubError for a token that may only read, or may not write for the owner (a pull request needs no more)."""
    if _role(account) == "read":
        raise HubError(
            f"the token of {account.get('name')} may only read: create one with write access at "
            "https://huggingface.co/settings/tokens, then pass it with --token or log in with `hf auth login`"
        )
    names = [str(account.get("name")), *(str(org.get("name")) for org in account.get("orgs") or ())]
    owner, _, name = repo_id.partition("/")
    if owner.lower() in (writable.lower() for writable in names) or (create_pr and exists):
        return
    pull_request = ", or open a pull request with --create-pr" if exists else ""
    raise HubError(
        f"the token belongs to {names[0]}, who cannot write for {owner}: push to {names[0]}/{name}{pull_request} "
        f"(it may write for: {', '.join(names)})"
    )


def _role(account: Mapping[str, Any]) -> str | None:
    token = (account.get("auth") or {}).get("accessToken") or {}
    role: str | None = token.get("role")
    return role
