"""`loftq verify`: checks that an artifact matches its `loftq.json` and, with its source, that its errors are right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from loftq.artifacts.backbone import backbone_of
from loftq.artifacts.checks import (
    UNREADABLE,
    Problem,
    adapter_problems,
    backbone_problems,
    collected,
    explained,
    model_problems,
)
from loftq.artifacts.pair import BackboneAndAdapter
from loftq.artifacts.recompute import compare_with_source, plan_again
from loftq.artifacts.rows import summed_errors
from loftq.display import key_values, size
from loftq.errors import OptionError
from loftq.formats.adapter import FOLDER, read_adapter
from loftq.formats.artifact import CARD, MANIFEST, Artifact, combine_hashes, read_artifact
from loftq.formats.checkpoint import INDEX
from loftq.formats.disk import is_inside
from loftq.formats.layouts import LAYOUTS
from loftq.hub.source import Source, find_source

_TOLERANCE = 1e-9  # of a total, which was computed from the same rows


@dataclass(frozen=True)
class Verification:
    """The result of comparing a folder with its `loftq.json`: the compared parts, and the problems."""

    folder: Path
    kind: str
    files: int
    bytes: int
    layers: int
    source: str | None  # the model from which the errors were computed again
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing differs."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        problems = [problem._asdict() for problem in self.problems]
        return {**asdict(self), "folder": str(self.folder), "problems": problems, "sound": self.sound}

    def table(self) -> str:
        """A table for a person, with the compared parts and a line for each problem."""
        rows = [
            ("folder", f"{self.folder}, {self.kind}"),
            ("files", f"{self.files}, {size(self.bytes)}: sizes and hashes"),
        ]
        if self.layers:
            rows.append(("layers", f"{self.layers}: names, dtypes and shapes"))
        if self.source:
            rows.append(("errors", f"computed again from {self.source}"))
        rows += [("note", note) for note in self.notes]
        rows += [("differs", f"{problem.where}: {problem.what}") for problem in self.problems]
        count = len(self.problems)
        rows.append(("result", "sound" if self.sound else f"{count} problem{'s' if count > 1 else ''}"))
        return key_values(rows)


def verify(
    folder: str | Path,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Verification:
    """Compare a loftq folder with its `loftq.json`: hashes, names, dtypes, shapes, completeness.

    `source` is the folder or Hub id of the model that the folder was made of. If it is given, the error of every layer
    is computed again from the values that bitsandbytes, or the linear of the format, reads from the files, and compared
    with the reported error; the other tensors are compared with those of the source. `revision` is by default the one
    in `loftq.json`. One tensor is in memory at a time. Changes of the card are allowed. Raises ArtifactError if the
    folder is not a loftq folder, SourceError if the source cannot be read, and OptionError if the folder has no errors
    to compute again.
    """
    artifact = read_artifact(folder)
    recorded = artifact.manifest.get("source", {})
    if source is not None and "sha256" not in recorded:
        kind = artifact.manifest["kind"]
        raise OptionError(
            f"--source {source}: {folder} is a {kind} folder, which has no errors of layers: verify it without --source"
        )
    if source is not None and str(source) == recorded.get("model"):
        revision = revision or recorded.get("revision")
    model = None
    if source is not None:
        model = find_source(str(source), revision=revision, token=token, trust_remote_code=trust_remote_code)
    problems = dict.fromkeys(_check(artifact, model, trust_remote_code, quiet))
    return Verification(
        folder=artifact.folder,
        kind=str(artifact.manifest["kind"]),
        files=len(artifact.files),
        bytes=sum(int(entry["bytes"]) for entry in artifact.files.values()),
        layers=len(artifact.manifest["layers"]) if _is_quantized(artifact) else 0,
        source=model.name if model else None,
        problems=tuple(problems),
        notes=tuple(_notes(artifact)),
    )


def _check(artifact: Artifact, source: Source | None, trust_remote_code: bool, quiet: bool) -> Iterator[Problem]:
    """Check the files, then their contents, then compare them with the source."""
    yield from _check_files(artifact, quiet)
    if not _is_quantized(artifact):
        return
    manifest = artifact.manifest
    try:
        backbone = backbone_of(artifact)
        adapter = read_adapter(artifact.adapter) if "rank" in manifest["recipe"] else None
    except UNREADABLE as error:
        yield Problem("headers", f"cannot be read: {explained(error)}")
        return
    yield from collected(backbone_problems(backbone, manifest), "the backbone")
    if adapter is not None:
        yield from collected(adapter_problems(backbone, adapter, manifest["recipe"]), "the adapter")
    yield from collected(_check_totals(artifact), MANIFEST)
    yield from collected(model_problems(backbone, adapter, trust_remote_code), "config.json")
    if source is not None and adapter is not None:
        pair = BackboneAndAdapter(backbone, adapter)
        yield from collected(_check_source(pair, source, manifest, trust_remote_code, quiet), source.name)


def _is_quantized(artifact: Artifact) -> bool:
    return artifact.manifest.get("format") in LAYOUTS and bool(artifact.manifest.get("layers"))


def _check_files(artifact: Artifact, quiet: bool) -> Iterator[Problem]:
    """Check every listed file, and report files of weights that are not listed."""
    total = sum(int(entry["bytes"]) for entry in artifact.files.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=quiet, dynamic_ncols=True, desc="files") as bar:
        for name, entry in sorted(artifact.files.items()):
            bar.set_postfix_str(name, refresh=False)
            difference = _difference(artifact.folder, name, entry)
            if difference is not None:
                yield Problem(name, difference)
            bar.update(int(entry["bytes"]))
    for folder in (artifact.folder, artifact.adapter):
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob(INDEX)]):
            name = path.relative_to(artifact.folder).as_posix()
            if name not in artifact.files:
                yield Problem(name, f"is not listed in {MANIFEST}, but loaders may read it")


def _difference(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    if not is_inside(name):
        return f"lies outside the folder: {MANIFEST} must not list it"
    path = folder / name
    if not path.is_file():
        return "is missing"
    if name == CARD:
        return None
    nbytes, expected = path.stat().st_size, int(entry["bytes"])
    if nbytes != expected:
        return f"has {nbytes} bytes, expected {expected}"
    with path.open("rb") as file:
        changed = "sha256" in entry and hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]
    return "SHA-256 mismatch" if changed else None


def _check_totals(artifact: Artifact) -> Iterator[Problem]:
    """Check the values of the manifest that follow from its other values."""
    manifest = artifact.manifest
    shards = [name for name in artifact.files if name.endswith(".safetensors") and not name.startswith(f"{FOLDER}/")]
    hashes = {name: str(artifact.files[name]["sha256"]) for name in shards if "sha256" in artifact.files[name]}
    if len(hashes) == len(shards) and combine_hashes(hashes) != manifest["backbone_sha256"]:
        yield Problem(MANIFEST, "has a hash of the backbone that does not match the hashes of its files")
    if "totals" in manifest:
        for name, value in summed_errors(manifest["layers"]).items():
            recorded = manifest["totals"].get(name)
            if recorded is None or abs(value - recorded) > _TOLERANCE:
                yield Problem(MANIFEST, f"has the total {name} {recorded}, but its layers have {value:.6g}")


def _check_source(
    pair: BackboneAndAdapter, source: Source, manifest: Mapping[str, Any], trust: bool, quiet: bool
) -> Iterator[Problem]:
    plan = plan_again(source, manifest, trust)
    total = plan.weights + sum(spec.numel for spec in plan.passed.values())
    with tqdm(total=total, unit="w", unit_scale=True, disable=quiet, dynamic_ncols=True, desc="errors") as bar:
        yield from compare_with_source(pair, plan, manifest, bar.update)


def _notes(artifact: Artifact) -> Iterator[str]:
    """Notes about parts that were not compared."""
    unhashed = [name for name, entry in artifact.files.items() if "sha256" not in entry]
    if unhashed:
        yield f"{MANIFEST} has no hashes of {len(unhashed)} files, so their contents were not compared"
