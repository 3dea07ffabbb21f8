"""`loftq push`: uploads a folder to a repository on the Hub, which can then be loaded by its id.

The files that `loftq.json` lists and `loftq.json` itself are uploaded. Some of them are changed: the configuration of
the adapter and the card name the repository, and neither they nor the other configurations contain a path of this
machine. The manifest has the hashes of the changed files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.artifacts.card_section import read_card, replace_marked
from loftq.artifacts.given_card import KIND, start_section
from loftq.artifacts.loading_snippet import loading_lines, loading_section
from loftq.artifacts.merged_card import merged_section
from loftq.artifacts.serving import serving_lines
from loftq.display import key_values, size
from loftq.errors import ArtifactError, OptionError
from loftq.formats.adapter import CONFIG, FOLDER, WEIGHTS, read_config
from loftq.formats.artifact import CARD, MANIFEST, Artifact, open_artifact
from loftq.formats.disk import explain_os_errors, is_inside
from loftq.formats.links import refuse_links
from loftq.formats.schema import json_text
from loftq.hub.destination import find_destination
from loftq.hub.public import public_json, without_homes, without_paths
from loftq.hub.text import public_name
from loftq.models.adapters import check_adapter
from loftq.settings import plain
from loftq.verbs.verify import verify

_STARTS = ("qlora", "qalora")  # kinds of folders that `loftq quantize` wrote
_LISTED = {  # the files that a folder of each kind must have
    **dict.fromkeys(_STARTS, (f"{FOLDER}/{CONFIG}", f"{FOLDER}/{WEIGHTS}", CARD, "config.json")),
    KIND: (f"{FOLDER}/{CONFIG}", f"{FOLDER}/{WEIGHTS}", CARD),
    "merged": (CARD, "config.json"),
    "gguf": (CARD,),
    "adapter": (CARD,),
}


@dataclass(frozen=True)
class PushReport:
    """The report of a push, or of a planned one, which has no commit.

    `files` are sizes in bytes by name, `lines` is the code that loads the result, or the commands that serve it.
    """

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
        """The totals as a table for a person."""
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
    """Upload a folder that `loftq quantize` or `loftq merge` wrote to the repository `repo_id`.

    The repository is created if it does not exist. `revision` is a branch, which is created too. `tag` names the
    commit. `create_pr` opens a pull request instead of changing the repository. `adapter` is the folder of an adapter
    that was trained on this backbone; it is uploaded to `subfolder`, by default one with the name of its folder. A
    backbone that the repository has already is replaced only with `overwrite`. `token` is by default that of the
    login. With `dry_run` nothing is sent. The folder stays unchanged. If interrupted, push again to continue. Raises
    LoftQError.
    """
    with explain_os_errors(Path(folder), action="read"):
        artifact = _check_folder(Path(folder))
    files: dict[str, Path | bytes] = _published(artifact, repo_id, revision)
    name = None
    if adapter is not None and artifact.manifest["kind"] not in _STARTS:
        raise OptionError(f"--adapter {adapter}: {folder} is merged, so adapters do not belong to it: push it alone")
    if adapter is not None:
        name = _check_subfolder(artifact, subfolder or Path(adapter).resolve().name)
        files |= _trained(artifact, Path(adapter), name, repo_id, revision)
    elif subfolder is not None:
        raise OptionError(f"--subfolder {subfolder} needs a trained adapter: name one with --adapter")
    destination = find_destination(
        repo_id, private=private, revision=revision, tag=tag, create_pr=create_pr, token=token
    )
    stale = destination.stale(artifact.manifest, files, overwrite)
    commit = None if dry_run else destination.send(files, stale, _message(artifact, name))
    return PushReport(
        repo_id=repo_id,
        url=destination.url,
        files={
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in files.items()
        },
        removed=stale,
        lines=_lines(artifact.manifest, repo_id, revision, name),
        private=private,
        revision=revision,
        tag=tag,
        commit=commit.oid if commit else None,
        pull_request=commit.pr_url if commit else None,
    )


def _check_folder(folder: Path) -> Artifact:
    """Open the folder and check that it is complete, and of a kind that can be pushed. Raises ArtifactError."""
    artifact = open_artifact(folder)
    kind = artifact.manifest["kind"]
    if kind not in _LISTED:
        raise ArtifactError(f"{folder} is a {kind} folder, which push does not know: expected {', '.join(_LISTED)}")
    listed = artifact.manifest["files"]
    if kind not in _STARTS and (CARD not in listed or "target" not in artifact.manifest.get("source", {})):
        raise ArtifactError(f"{folder} was merged by an older loftq, without a card: merge it again")
    for name in _LISTED[kind]:
        if name not in listed:
            raise ArtifactError(f"{folder / MANIFEST} is damaged: it does not list {name}")
    for name in listed:
        if not is_inside(name):
            raise ArtifactError(f"{folder / MANIFEST} is damaged: it lists {name!r}, which lies outside its folder")
    refuse_links(folder, listed, ArtifactError)
    problems = verify(folder, quiet=True).problems
    if problems:
        raise ArtifactError(
            f"{folder} does not match its {MANIFEST}: {problems[0].where}: {problems[0].what} "
            f"(`loftq verify {folder}` lists all problems): quantize the model again"
        )
    return artifact


def _published(artifact: Artifact, repo_id: str, revision: str | None) -> dict[str, Path | bytes]:
    """The files of the artifact by name: a path, or the content of a file that is changed for the repository."""
    manifest = plain(artifact.manifest)
    card = read_card(artifact.folder / CARD)
    changed = {name: public for name in manifest["files"] if (public := _public_config(artifact.folder, name))}
    starts = manifest["kind"] in _STARTS
    sections = {KIND: start_section, **dict.fromkeys(_STARTS, loading_section)}
    section = sections.get(manifest["kind"], merged_section)(manifest, repo_id, revision)
    changed[CARD] = without_homes(replace_marked(card, section)).encode()
    if starts:
        changed[f"{FOLDER}/{CONFIG}"] = _adapter_config(artifact.adapter, repo_id, revision)
    for name, content in changed.items():
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    recipe = manifest["recipe"]
    if recipe.get("calibration") is not None:
        recipe["calibration"] = public_name(recipe["calibration"])
    changed[MANIFEST] = (json_text(without_paths(manifest), indent=1, sort_keys=True) + "\n").encode()
    return {name: artifact.folder / name for name in manifest["files"]} | changed


def _public_config(folder: Path, name: str) -> bytes | None:
    """The content of a configuration without paths; None for a file that is uploaded as it is."""
    if not name.endswith(".json"):
        return None
    content = (folder / name).read_bytes()
    public = public_json(name, content)
    return None if public == content else public


def _trained(
    artifact: Artifact, folder: Path, name: str, repo_id: str, revision: str | None
) -> dict[str, Path | bytes]:
    """The files of a trained adapter, with its card. Raises ArtifactError if it belongs to another backbone."""
    refuse_links(folder.parent, [folder.name], ArtifactError)
    refuse_links(folder, [CONFIG, WEIGHTS], ArtifactError)
    check_adapter(artifact, folder)
    card = f"""# {name}

A LoRA adapter that was trained on the backbone of this repository. Use it only with this backbone: with any other, and
with the weights that the backbone was made from, it corrects errors that do not exist there.

```python
{loading_lines(artifact.manifest, repo_id, revision, name)}```
"""
    return {
        f"{name}/{CONFIG}": _adapter_config(folder, repo_id, revision),
        f"{name}/{WEIGHTS}": folder / WEIGHTS,
        f"{name}/{CARD}": card.encode(),
    }


def _adapter_config(folder: Path, repo_id: str, revision: str | None) -> bytes:
    """The configuration of an adapter, with the repository as its base model."""
    config = read_config(folder)
    config["base_model_name_or_path"] = repo_id
    if revision is not None:
        config["revision"] = revision
    return (json_text(without_paths(config), indent=2, sort_keys=True) + "\n").encode()


def _check_subfolder(artifact: Artifact, name: str) -> str:
    taken = {FOLDER, *(file.partition("/")[0] for file in artifact.manifest["files"])}
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name) or name.partition("/")[0] in taken:
        raise OptionError(
            f"--subfolder {name}: expected a name like gsm8k that the repository does not use yet (used: {FOLDER})"
        )
    return name


def _lines(manifest: Mapping[str, Any], repo_id: str, revision: str | None, trained: str | None) -> str:
    """The lines that load a start with its adapter, or those that serve what was merged."""
    if manifest["kind"] in _STARTS:
        return loading_lines(manifest, repo_id, revision, trained)
    if manifest["kind"] == KIND:
        return start_section(manifest, repo_id, revision).strip("`").removeprefix("python\n")
    return "".join(f"{line}\n" for line in serving_lines(manifest, repo_id, revision))


def _message(artifact: Artifact, adapter: str | None) -> str:
    """The message of the commit."""
    recipe, made_from = artifact.manifest["recipe"], artifact.manifest["source"]
    if artifact.manifest["kind"] == KIND:
        return f"{Path(made_from['model']).name}, adapter, by loftq"
    if artifact.manifest["kind"] not in _STARTS:
        return f"{made_from['model']}, {made_from['target']}, by loftq"
    source = Path(made_from["model"]).name
    trained = "" if adapter is None else f", and the adapter {adapter}"
    return f"{source} in {recipe['bits']} bits, rank {recipe['rank']}, by loftq{trained}"
