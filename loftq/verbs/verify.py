"""`loftq verify`: checks that an artifact matches its `loftq.json` and, with its source, that its errors are right."""

from __future__ import annotations

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
from loftq.artifacts.given_card import KIND
from loftq.artifacts.given_checks import compare_with_backbone
from loftq.artifacts.pair import BackboneAndAdapter
from loftq.artifacts.recompute import compare_with_source, plan_again
from loftq.artifacts.rows import summed_errors
from loftq.artifacts.written import listed_difference
from loftq.artifacts.zeroed import implausible_zeros, new_zeros
from loftq.collector import paused_collector
from loftq.display import few_of, key_values, size
from loftq.errors import OptionError
from loftq.formats.adapter import FOLDER, read_adapter
from loftq.formats.artifact import CARD, MANIFEST, Artifact, combine_hashes, read_artifact
from loftq.formats.checkpoint import INDEX
from loftq.formats.disk import PARTIAL, is_inside
from loftq.formats.layouts import LAYOUTS
from loftq.formats.links import linked_part, links_below
from loftq.formats.programs import programs_below
from loftq.formats.scan import scan
from loftq.hub.folder import fetch_folder
from loftq.hub.source import Source, find_source

_QUANTIZED = ("qlora", "qalora")  # kinds of folders that have quantized layers and an adapter
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
    unchecked: tuple[str, ...] = ()  # files whose contents could not be compared

    @property
    def sound(self) -> bool:
        """Whether everything was compared, and nothing differs."""
        return not self.problems and not self.unchecked

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        problems = [problem._asdict() for problem in self.problems]
        return {**asdict(self), "folder": str(self.folder), "problems": problems, "sound": self.sound}

    def table(self) -> str:
        """A table for a person, with the compared parts and a line for each problem."""
        rows = [
            ("folder", f"{self.folder}, {self.kind}"),
            ("files", f"{self.files}, {size(self.bytes)}: sizes and hashes{self._except()}"),
        ]
        if self.layers:
            rows.append(("layers", f"{self.layers}: names, dtypes and shapes"))
        if self.source:
            rows.append(("errors", f"computed again from {self.source}"))
        rows += [("note", note) for note in self.notes]
        rows += [("differs", f"{problem.where}: {problem.what}") for problem in self.problems]
        count = len(self.problems)
        result = f"{count} problem{'s' if count > 1 else ''}" if count else "not fully checked"
        rows.append(("result", "sound" if self.sound else result))
        return key_values(rows)

    def _except(self) -> str:
        return f" (no hashes of {len(self.unchecked)} of them)" if self.unchecked else ""


@paused_collector()
def verify(
    folder: str | Path,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = True,
) -> Verification:
    """Compare a loftq folder with its `loftq.json`: hashes, names, dtypes, shapes, completeness.

    `folder` may also be `OWNER/NAME` or `OWNER/NAME@REVISION` on the Hub, of which all files are then downloaded.
    `source` is the folder or Hub id of the model that the folder was made of. If it is given, the error of every layer
    is computed again from the values that bitsandbytes, or the linear of the format, reads from the files, and compared
    with the reported error; the other tensors are compared with those of the source. `revision` is by default the one
    in `loftq.json`. One tensor is in memory at a time. Changes of the card are allowed. A folder is sound only if
    `loftq.json` has the hashes of all other files. Raises ArtifactError if the folder is not a loftq folder,
    SourceError if it or the source cannot be read, and OptionError if the folder has no errors to compute again.
    """
    artifact = read_artifact(fetch_folder(folder, token=token))
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
        unchecked=tuple(_unhashed(artifact)),
    )


def _check(artifact: Artifact, source: Source | None, trust_remote_code: bool, quiet: bool) -> Iterator[Problem]:
    """Check the files, then their contents, then compare them with the source."""
    links = [name for name in links_below(artifact.folder) if not name.startswith(f"{PARTIAL}/")]
    for name in links:
        yield Problem(name, "is a symbolic link, which is not followed: a copy must take its place")
    zero_blocks: dict[str, int] = {}
    yield from _check_files(artifact, zero_blocks, quiet)
    if links:  # what they lead to is not read
        return
    yield from new_zeros(zero_blocks, artifact.manifest)
    if artifact.manifest["kind"] == KIND and "layers" in artifact.manifest:
        yield from collected(_check_totals(artifact), MANIFEST)
        if source is not None:
            yield from collected(_check_start(artifact, source, trust_remote_code, quiet), source.name)
        return
    if not _is_quantized(artifact):
        if artifact.manifest["kind"] in _QUANTIZED:
            yield Problem(MANIFEST, "lists no layers of a format that loftq reads")
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
    pair = None if adapter is None else BackboneAndAdapter(backbone, adapter)
    yield from collected(implausible_zeros(zero_blocks, backbone, pair, manifest), "the backbone")
    yield from collected(_check_totals(artifact), MANIFEST)
    yield from collected(model_problems(backbone, adapter, trust_remote_code), "config.json")
    if source is not None and pair is not None:
        yield from collected(_check_source(pair, source, manifest, trust_remote_code, quiet), source.name)


def _is_quantized(artifact: Artifact) -> bool:
    return artifact.manifest.get("format") in LAYOUTS and bool(artifact.manifest.get("layers"))


def _check_files(artifact: Artifact, zero_blocks: dict[str, int], quiet: bool) -> Iterator[Problem]:
    """Check every listed file, and report files that loaders read but that are not listed.

    `zero_blocks` gets the number of blocks of zeros of each tensor that has any.
    """
    total = sum(int(entry["bytes"]) for entry in artifact.files.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=quiet, dynamic_ncols=True, desc="files") as bar:
        for name, entry in sorted(artifact.files.items()):
            bar.set_postfix_str(name, refresh=False)
            if not is_inside(name):
                yield Problem(name, f"lies outside the folder: {MANIFEST} must not list it")
                continue
            if linked_part(artifact.folder, name) is not None:
                continue  # reported as a link
            contents = scan(artifact.folder / name) if (artifact.folder / name).is_file() else None
            difference = listed_difference(artifact.folder, name, entry, contents)
            if difference is not None:
                yield Problem(name, difference)
            elif contents is not None:
                zero_blocks |= contents.zero_blocks
            bar.update(int(entry["bytes"]))
    for folder in (artifact.folder, artifact.adapter):
        patterns = ("*.safetensors", INDEX, "*config.json")
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern)) if folder.is_dir() else ():
            name = path.relative_to(artifact.folder).as_posix()
            if name not in artifact.files:
                yield Problem(name, f"is not listed in {MANIFEST}, but loaders may read it")


def _check_totals(artifact: Artifact) -> Iterator[Problem]:
    """Check the values of the manifest that follow from its other values."""
    manifest = artifact.manifest
    shards = [name for name in artifact.files if name.endswith(".safetensors") and not name.startswith(f"{FOLDER}/")]
    hashes = {name: str(artifact.files[name]["sha256"]) for name in shards if "sha256" in artifact.files[name]}
    if shards and len(hashes) == len(shards) and combine_hashes(hashes) != manifest["backbone_sha256"]:
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


def _check_start(artifact: Artifact, source: Source, trust: bool, quiet: bool) -> Iterator[Problem]:
    total = int(artifact.manifest["totals"]["weights"])
    with tqdm(total=total, unit="w", unit_scale=True, disable=quiet, dynamic_ncols=True, desc="errors") as bar:
        yield from compare_with_backbone(artifact, source, trust, bar.update)


def _notes(artifact: Artifact) -> Iterator[str]:
    """Notes about parts that were not compared."""
    unhashed = _unhashed(artifact)
    if unhashed:
        names = few_of(unhashed)
        yield f"{MANIFEST} has no hashes of {len(unhashed)} files, so their contents were not compared ({names})"
    programs = sorted(programs_below(artifact.folder))
    if programs:
        yield f"files that are programs or pickles, which can run code: {few_of(programs)}"


def _unhashed(artifact: Artifact) -> list[str]:
    """The files without a hash in the manifest, except the card, which the user may edit."""
    return [name for name, entry in artifact.files.items() if not entry.get("sha256") and name != CARD]
