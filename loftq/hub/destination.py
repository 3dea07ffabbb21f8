"""The repository that a folder is pushed to: who may write it, what it holds, and the commit that changes it.

All that can be refused is refused before the first byte is sent: an id that is none, a token that may not write, a name
that is taken. Weights are then sent file by file, and what has arrived is not sent twice. One commit makes all of them
the repository's, so that nobody ever loads a part of a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.display import few_of, one_line
from loftq.errors import HubError, OptionError
from loftq.formats.artifact import MANIFEST
from loftq.hub.errors import checked_token, explain_push_refusals

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_NO_MODEL = {".gitattributes", "README.md", "LICENSE", ".gitignore"}  # what a new repository may begin with


@dataclass(frozen=True)
class Destination:
    """A repository that may be written, or made, and what it holds at the revision."""

    api: HfApi
    repo_id: str
    private: bool
    revision: str | None  # a branch; None for main
    tag: str | None
    create_pr: bool
    exists: bool
    head: str | None  # the commit of the revision, where there is one
    tagged: str | None  # the commit that has the tag already
    files: frozenset[str]  # of the revision, or of the one from which its branch will begin

    @property
    def url(self) -> str:
        """Where it is read."""
        return f"{self.api.endpoint}/{self.repo_id}"

    def refuse_other_models(self) -> None:
        """Raise HubError where the revision holds a model that is not of ours, which a push would mingle with."""
        held = self.files - _NO_MODEL
        if held and MANIFEST not in held and self.head is not None and not self.create_pr:
            raise HubError(
                f"{self._place} holds another model ({few_of(sorted(held))}): name another repository, "
                "a new branch of this one with --revision, or ask its owner with --create-pr"
            )

    def stale(self, artifact: Mapping[str, Any], names: Collection[str], overwrite: bool) -> list[str]:
        """The files that must go when an artifact with this manifest and these files comes.

        Raises HubError where the revision holds something else: another model, or, without `overwrite`, an artifact
        with another backbone, which adapters may have been trained on.
        """
        self.refuse_other_models()
        held = self.files - _NO_MODEL
        if self.exists and self.head is None:  # a new branch begins with all that main has, which is none of its own
            return sorted(held - set(names))
        if MANIFEST not in held:
            return []
        theirs = self._manifest()
        if theirs.get("backbone_sha256") != artifact["backbone_sha256"] and not (overwrite or self.create_pr):
            raise HubError(
                f"{self._place} holds a loftq model with another backbone, to which the adapters belong that were "
                "trained on it: add --overwrite to replace it, or name a new branch with --revision"
            )
        return sorted(held & set(theirs.get("files", ())) - set(names))

    def send(self, files: Mapping[str, Path | bytes], stale: Collection[str], message: str) -> CommitInfo:
        """Make the repository where it is new, send all files, and commit them at once. Raises HubError."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = {name: CommitOperationAdd(name, content) for name, content in files.items()}
        with explain_push_refusals(self.repo_id):
            if not self.exists:
                self.api.create_repo(self.repo_id, private=self.private or None)
            for name, addition in additions.items():
                if name.endswith(".safetensors"):
                    self.api.preupload_lfs_files(
                        self.repo_id,
                        [addition],
                        revision=None if self.head is None else self.revision,
                        create_pr=self.create_pr,
                        free_memory=False,
                    )
            if self.revision is not None and self.head is None:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            made: CommitInfo = self.api.create_commit(
                self.repo_id,
                [*(CommitOperationDelete(name) for name in stale), *additions.values()],
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr,
            )
            self._add_tag(made.oid)
        return made

    def _add_tag(self, commit: str) -> None:
        if self.tag is None or self.tagged == commit:
            return
        if self.tagged is not None:
            raise HubError(f"pushed as {commit}, but {self._taken_tag}")
        self.api.create_tag(self.repo_id, tag=self.tag, revision=commit)

    @property
    def _taken_tag(self) -> str:
        return f"--tag {self.tag} names another commit of {self.repo_id} ({self.tagged}): choose another"

    @property
    def _place(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}, revision {self.revision},"

    def _manifest(self) -> dict[str, Any]:
        with explain_push_refusals(self.repo_id):
            path = self.api.hf_hub_download(self.repo_id, MANIFEST, revision=self.head)
        try:
            return dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError):  # damaged there: another one, whatever it was
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
    """Look at a repository to be. Raises OptionError for names that are none, HubError for what the Hub would refuse:
    no token or one that may not write there, `private` for one that is public, a tag that is another commit's.
    """
    from huggingface_hub import HfApi, get_token

    _check_names(repo_id, revision, tag, create_pr)
    token = checked_token(token)
    if token is None and get_token() is None:
        raise HubError(
            "no Hub token: log in with `hf auth login`, or pass --token "
            "(https://huggingface.co/settings/tokens makes one that may write)"
        )
    api = HfApi(token=token)
    with explain_push_refusals(repo_id):
        who = api.whoami()
        info, head = _look_up(api, repo_id, revision)
        tags = api.list_repo_refs(repo_id).tags if info is not None and tag is not None else []
    _check_owner(who, repo_id, info is not None, create_pr)
    if info is not None and private and not info.private:
        raise HubError(
            f"{repo_id} is there already, and public: --private is for a new one. "
            "Change it in its settings, or name another"
        )
    found = Destination(
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
    if found.tagged is not None and found.tagged != head:
        raise HubError(found._taken_tag)
    return found


def _check_names(repo_id: str, revision: str | None, tag: str | None, create_pr: bool) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OptionError(f"{repo_id!r} is no id of a repository, USER/NAME: {one_line(error)}") from error
    if "/" not in repo_id:
        raise OptionError(f"{repo_id!r} is no id of a repository: name its owner too, as in USER/{repo_id}")
    for option, name in (("--revision", revision), ("--tag", tag)):
        if name is not None and not re.fullmatch(r"(?!.*(\.\.|//|\.lock$|[/.]$))\w[\w./-]*", name):
            raise OptionError(f"{option} {name}: no name that git takes")
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise OptionError(f"--revision {revision} is a commit, which never changes: name a branch")
    for option, name in (("--revision", revision), ("--tag", tag)):
        if create_pr and name is not None:
            raise OptionError(f"--create-pr and {option} exclude each other: a pull request is a revision of its own")


def _look_up(api: HfApi, repo_id: str, revision: str | None) -> tuple[Any, str | None]:
    """What the Hub says of a repository, None where there is none, and the commit of its revision, likewise."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        return api.model_info(repo_id), None
    except RepositoryNotFoundError:
        return None, None
    return info, info.sha


def _check_owner(who: Mapping[str, Any], repo_id: str, exists: bool, create_pr: bool) -> None:
    """Refuse a token that only reads, and an owner that it does not write for, but for pull requests."""
    if _role(who) == "read":
        raise HubError(
            f"the token of {who.get('name')} may only read: pass --token with one that may write "
            "(https://huggingface.co/settings/tokens), or log in with it: `hf auth login`"
        )
    names = [str(who.get("name")), *(str(org.get("name")) for org in who.get("orgs") or ())]
    owner, _, name = repo_id.partition("/")
    if owner.lower() in (known.lower() for known in names) or (create_pr and exists):
        return
    otherwise = ", or ask its owner with --create-pr" if exists else ""
    raise HubError(
        f"the token is one of {names[0]}, who cannot write for {owner}: push to {names[0]}/{name}{otherwise} "
        f"(it may write for: {', '.join(names)})"
    )


def _role(who: Mapping[str, Any]) -> str | None:
    token = (who.get("auth") or {}).get("accessToken") or {}
    found: str | None = token.get("role")
    return found
