"""`loftq merge`: a backbone and a trained adapter become one model, shard by shard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Unpack

from loftq.artifacts.pair import open_pair
from loftq.artifacts.staging import check_output, open_staging
from loftq.chatter import silenced
from loftq.errors import OptionError, UnknownNameError
from loftq.formats.artifact import read_artifact
from loftq.formats.checkpoint import parse_size
from loftq.formats.disk import explain_os_errors
from loftq.formats.space import check_space
from loftq.hub.folder import fetch_folder
from loftq.merging.dense_gguf import DenseGguf, is_dense
from loftq.merging.export import Export
from loftq.merging.logits import checked_difference
from loftq.merging.report import MergeReport
from loftq.merging.settings import MergeKeywords, MergeRun, MergeSettings
from loftq.merging.target import Target
from loftq.merging.targets import TARGETS
from loftq.models.trained_folder import with_backbone
from loftq.planning.run import check_resume
from loftq.settings import from_dict, option_name, said, split


@silenced()
def merge(
    folder: str | Path,
    adapter: str | Path | None = None,
    *,
    to: str,
    output: str | Path,
    **settings: Unpack[MergeKeywords],
) -> MergeReport:
    """Merge an adapter (default: the initial one) into the backbone of `folder`, and write `output`.

    `to` is one of `TARGETS`. `folder` is one of ours, a GPTQ checkpoint, or that of a trained adapter, which knows its
    backbone; for `gguf` it may also be a dense model, of transformers or merged before. It and `adapter` may be on the
    Hub: `OWNER/NAME` or `OWNER/NAME@REVISION`. The other keywords are the
    options of `loftq merge --help` with underscores. One linear is in memory at a time; `check` then compares the
    logits of a few tokens before and after, for which each model is loaded once. Raises LoftQError, and leaves no
    output where the check fails.
    """
    started = time.perf_counter()
    if to not in TARGETS:
        raise UnknownNameError("target", to, TARGETS)
    of_run, of_target = split(settings, MergeRun, MergeSettings)
    if of_target.get("device") is not None:
        of_target["device"] = str(of_target["device"])  # settings are plain values, not a torch.device
    run = from_dict(MergeRun, {**of_run, "output": output})
    chosen = _check_uses(to, from_dict(MergeSettings, of_target))
    check_resume(run.resume, run.overwrite)
    parse_size(run.max_shard_size)
    out = Path(output)
    check_output(out, resume=run.resume, overwrite=run.overwrite)
    target = _open(*_found(folder, adapter), to, chosen, run)
    notes = target.notes()
    lost = target.check()
    with explain_os_errors(out):
        check_space(out, target.planned_bytes)
    fingerprint = target.fingerprint()
    with open_staging(out, fingerprint, overwrite=run.overwrite) as staging:
        if not staging.ready:
            target.write(staging)
            target.check_sources(fingerprint)
            if run.check and isinstance(target, Target) and target.comparable:
                target.difference = checked_difference(target, staging)
        staging.publish()
    with explain_os_errors(out, action="read"):
        files = read_artifact(out).manifest["files"]
    nbytes = sum(entry["bytes"] for name, entry in files.items() if name.endswith(target.suffix))
    seconds = time.perf_counter() - started
    return MergeReport(out, to, nbytes, target.layers, target.difference, lost, notes, seconds)


def _open(folder: Path, adapter: str | None, to: str, settings: MergeSettings, run: MergeRun) -> Export:
    """What is to be written. Raises OptionError for a dense model that is not converted to GGUF."""
    if not is_dense(folder):
        pair = open_pair(folder, adapter)
        return TARGETS[to].of(pair)(pair, settings, run)
    if to != DenseGguf.name:
        raise OptionError(f"{folder} is a dense model, which only --to gguf takes: quantize it with `loftq quantize`")
    if adapter is not None:
        raise OptionError(
            f"--adapter {adapter}: {folder} is a dense model, and adapters are merged only into the backbone that they "
            "were trained on: name the folder that `loftq quantize` wrote, or merge it with peft's merge_and_unload"
        )
    return DenseGguf(folder, settings, run)


def _found(folder: str | Path, adapter: str | Path | None) -> tuple[Path, str | None]:
    """The folder of the backbone, which is downloaded if its name is that of a repository, and the adapter."""
    name, chosen = with_backbone(str(folder), None if adapter is None else str(adapter))
    return fetch_folder(name), chosen


def _check_uses(to: str, settings: MergeSettings) -> MergeSettings:
    """The settings. Raises OptionError for one that the target does not use."""
    for name, value in said(settings).items():
        users = [target for target, kind in TARGETS.items() if name in kind.uses]
        if to not in users:
            shown = option_name(name) if value is True else f"{option_name(name)} {value}"
            raise OptionError(f"{shown}: --to {to} does not use it, only --to {' and '.join(users)}: leave it out")
    return settings
