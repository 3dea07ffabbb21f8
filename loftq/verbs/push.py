"""`loftq push`: a folder becomes a repository on the Hub that its id loads.

What is uploaded is what `loftq.json` lists, and itself. Three files are others there than here: the adapter's
configuration and the card name the repository, and the manifest, which hashes both, names no place of this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.artifacts.card_section import replace_marked
from loftq.artifacts.loading_snippet import loading_lines, loading_section
from loftq.display import key_values, size
from loftq.errors import ArtifactError, OptionError
from loftq.formats.adapter import CONFIG, FOLDER, WEIGHTS
from loftq.formats.artifact import CARD, MANIFEST, Artifact, open_artifact
from loftq.formats.disk import is_inside
from loftq.hub.destination import find_destination
from loftq.hub.text import public_name
from loftq.models.adapters import check_adapter
from loftq.verbs.verify import verify


@dataclass(frozen=True)
class PushReport:
    """What was pushed, or, without a commit, would be. `files` are bytes by name, `lines` load the result."""

    repo_id: str
    url: str
    files: Mapping[str, int]
    removed: Sequence[str]
    lines: str
    private: bool
    revision: str | None = None
    tag: str | None = None
    commit: str | None = None
    pull_request: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {**vars(self), "files": dict(self.files), "removed": list(self.removed)}

    def table(self) -> str:
        """The totals, for a person."""
        planned = "" if self.commit else " (planned, nothing was sent)"
        rows = [
            ("repository", self.url + (", private" if self.private else "")),
            ("files", f"{len(self.files)}, {size(sum(self.files.values()))}{planned}"),
            *(("removed", name) for name in self.removed),
        ]
        named = {"revision": self.revision, "tag": self.tag, "commit": self.commit, "pull request": self.pull_request}
        rows += [(name, value) for name, value in named.items() if value is not None]
        return key_values(rows)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    adapter: str | Path | None = None,
    subfolder: str | None = None,
    overwrite: bool = False,
    token: str | None = None,
    dry_run: bool = False,
) -> PushReport:
    """Upload a folder that `loftq quantize` wrote to the repository `repo_id`, which is made where it is new.

    `revision` is a branch, made where it is new; `tag` names the commit; `create_pr` proposes it to somebody else's
    repository. `adapter`, one that was trained on this backbone, goes to `subfolder`, by default one of its own name.
    A backbone that is there already is replaced with `overwrite` alone. `token` is by default that of the login. The
    folder stays as it is; an upload that broke off goes on where it was. Raises LoftQError.
    """
    artifact = _check_folder(Path(folder))
    files: dict[str, Path | bytes] = _published(artifact, repo_id, revision)
    name = None
    if adapter is not None:
        name = _check_subfolder(artifact, subfolder or Path(adapter).resolve().name)
        files |= _trained(artifact, Path(adapter), name, repo_id, revision)
    elif subfolder is not None:
        raise OptionError(f"--subfolder {subfolder}: is for a trained adapter: name one with --adapter")
    destination = find_destination(
        repo_id, private=private, revision=revision, tag=tag, create_pr=create_pr, token=token
    )
    stale = destination.stale(artifact.manifest, files, overwrite)
    made = None if dry_run else destination.send(files, stale, _message(artifact, name))
    return PushReport(
        repo_id=repo_id,
        url=destination.url,
        files={
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in files.items()
        },
        removed=stale,
        lines=loading_lines(artifact.manifest, repo_id, revision, name),
        private=private,
        revision=revision,
        tag=tag,
        commit=made.oid if made else None,
        pull_request=made.pr_url if made else None,
    )


def _check_folder(folder: Path) -> Artifact:
    """The folder, complete and of a kind that loads with its adapter. Raises ArtifactError."""
    artifact = open_artifact(folder)
    kind = artifact.manifest["kind"]
    if kind not in ("qlora", "qalora"):
        raise ArtifactError(
            f"{folder} is a {kind} folder, which no adapter goes with: `hf upload REPO_ID {folder}` sends it as it is"
        )
    listed = artifact.manifest["files"]
    for name in (f"{FOLDER}/{CONFIG}", f"{FOLDER}/{WEIGHTS}", CARD, "config.json"):
        if name not in listed:
            raise ArtifactError(f"{folder / MANIFEST} is damaged: it does not list {name}")
    for name in listed:
        if not is_inside(name):
            raise ArtifactError(f"{folder / MANIFEST} is damaged: it lists {name!r}, which lies outside its folder")
    problems = verify(folder, quiet=True).problems
    if problems:
        raise ArtifactError(
            f"{folder} is not what its {MANIFEST} says: {problems[0].where}: {problems[0].what} "
            f"(`loftq verify {folder}` shows all): quantize the model again"
        )
    return artifact


def _published(artifact: Artifact, repo_id: str, revision: str | None) -> dict[str, Path | bytes]:
    """The files of the artifact by name: those that are others in the repository as their content."""
    manifest = json.loads(json.dumps(artifact.manifest))
    card = (artifact.folder / CARD).read_text(encoding="utf-8")
    changed = {
        f"{FOLDER}/{CONFIG}": _adapter_config(artifact.adapter, repo_id, revision),
        CARD: replace_marked(card, loading_section(manifest, repo_id, revision)).encode(),
    }
    for name, content in changed.items():
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    source, recipe = manifest["source"], manifest["recipe"]
    if Path(source["model"]).is_absolute():
        source["model"] = Path(source["model"]).name
    if recipe["calibration"] is not None:
        recipe["calibration"] = public_name(recipe["calibration"])
    changed[MANIFEST] = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
    return {name: artifact.folder / name for name in manifest["files"]} | changed


def _trained(
    artifact: Artifact, folder: Path, name: str, repo_id: str, revision: str | None
) -> dict[str, Path | bytes]:
    """The files of a trained adapter, with a card of its own. Raises ArtifactError where it is another backbone's."""
    check_adapter(artifact, folder)
    card = f"""# {name}

A LoRA adapter that was trained on the backbone of this repository. It belongs to it: on any other, and on the weights
that the backbone was made from, it repairs errors that are not there.

```python
{loading_lines(artifact.manifest, repo_id, revision, name)}```
"""
    return {
        f"{name}/{CONFIG}": _adapter_config(folder, repo_id, revision),
        f"{name}/{WEIGHTS}": folder / WEIGHTS,
        f"{name}/{CARD}": card.encode(),
    }


def _adapter_config(folder: Path, repo_id: str, revision: str | None) -> bytes:
    """An adapter's configuration with the repository as its base model."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = repo_id
    if revision is not None:
        config["revision"] = revision
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _check_subfolder(artifact: Artifact, name: str) -> str:
    taken = {FOLDER, *(file.partition("/")[0] for file in artifact.manifest["files"])}
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name) or name.partition("/")[0] in taken:
        raise OptionError(f"--subfolder {name}: expected a name of its own, like gsm8k (taken: {FOLDER})")
    return name


def _message(artifact: Artifact, adapter: str | None) -> str:
    """What the commit is called."""
    recipe = artifact.manifest["recipe"]
    source = Path(artifact.manifest["source"]["model"]).name
    trained = "" if adapter is None else f", and the adapter {adapter}"
    return f"{source} in {recipe['bits']} bits, rank {recipe['rank']}, by loftq{trained}"
