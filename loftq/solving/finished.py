"""A folder that is complete already is used again if it is the result of the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loftq.artifacts.written import listed_difference
from loftq.calibration.gather import windows_of
from loftq.calibration.statistics import Statistics
from loftq.errors import OutputError, SourceError
from loftq.formats import artifact
from loftq.hub.text import find_text
from loftq.planning.plan import Plan
from loftq.planning.weights import digest_of, source_digest
from loftq.settings import plain

ANOTHER = "add --overwrite instead of --resume to make it again, or name another --output"


def finished_layers(folder: Path, plan: Plan, trust_remote_code: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The layers and totals of a complete folder. Raises OutputError if it is the result of another run."""
    finished = artifact.open_artifact(folder)
    manifest = finished.manifest
    if differing := differences(manifest, plan):
        raise OutputError(f"{folder} is finished, but its {', '.join(differing)} differs: {ANOTHER}")
    if _is_changed(plan, manifest["source"]):
        raise OutputError(
            f"the weights of {plan.source.name} have changed since {folder} was made from it: make it again "
            f"(`loftq quantize {plan.source.name} ... --output {folder} --overwrite`) or remove it"
        )
    check_files(folder, finished)
    text = plan.recipe.calibration
    calibrated = manifest.get("calibration")
    if text and calibrated and find_text(text) and windows_of(plan, trust_remote_code).settings != calibrated:
        raise OutputError(
            f"{folder} was calibrated on another text or with another tokenizer than {text} is now: {ANOTHER}"
        )
    return list(manifest["layers"]), dict(manifest["totals"])


def check_files(folder: Path, finished: artifact.Artifact) -> None:
    """Raise OutputError for a file of a complete folder that is not as its manifest lists it."""
    for name, entry in finished.files.items():
        difference = listed_difference(folder, name, entry)
        if difference is not None:
            raise OutputError(f"{folder} is finished, but its {name} {difference}: {ANOTHER}")


def differences(manifest: Mapping[str, Any], plan: Plan) -> list[str]:
    """The names of settings that differ between an artifact's manifest and a plan; `source` if the models differ."""
    planned = plain(plan.recipe.to_dict())
    differing = [key for key in planned if manifest["recipe"].get(key) != planned[key]]
    if (manifest["source"]["model"], manifest["source"]["revision"]) != (plan.source.name, plan.source.revision):
        differing.append("source")
    return differing


def _is_changed(plan: Plan, source: Mapping[str, Any]) -> bool:
    """Whether the weights of the source have changed, for which all are read; those of a commit never change."""
    if plan.source.revision is not None or "sha256" not in source:
        return False
    hashes = {layer.tensor: source_digest(plan, layer) for layer in plan.layers}
    hashes |= {name: digest_of(plan.source.checkpoint.read(name)) for name in plan.passed}
    return artifact.combine_hashes(hashes) != str(source["sha256"])


def fingerprint_of(
    plan: Plan, statistics: Statistics | None, device: torch.device, trust_remote_code: bool
) -> dict[str, Any]:
    """Everything that the bytes of the result depend on. An unfinished run is resumed only if all of it is the same."""
    return {
        "source": {
            "name": plan.source.name,
            "revision": plan.source.revision,
            "files": plan.source.file_states(),
            "side_files": plan.source.side_states(trust_remote_code),
        },
        "recipe": plan.recipe.to_dict(),
        "calibration": statistics.settings if statistics is not None else None,
        "device": device.type,
        "versions": {name: version(name) for name in ("loftq", "torch", "transformers")},
    }


def check_source(plan: Plan, fingerprint: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raise SourceError if a file of the source is not the one that it was when the fingerprint was made."""
    recorded = fingerprint["source"]
    check_unchanged(
        plan.source.folder,
        {**recorded["files"], **recorded["side_files"]},
        lambda: {**plan.source.file_states(), **plan.source.side_states(trust_remote_code)},
        "restore the source and run again with --resume, or start again with --overwrite",
    )


def check_unchanged(
    folder: Path, before: Mapping[str, Any], states: Callable[[], Mapping[str, Any]], advice: str
) -> None:
    """Raise SourceError if the states of files in a folder are not those `before`."""
    try:
        now = states()
    except FileNotFoundError as error:
        raise SourceError(f"{error.filename} was removed during the run: {advice}") from error
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        raise SourceError(f"{folder / changed[0]} was changed during the run: {advice}")
