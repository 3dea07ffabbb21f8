"""`loftq merge`: a backbone and a trained adapter become one model, shard by shard."""

from __future__ import annotations

import time
from pathlib import Path

from loftq.artifacts.pair import open_pair
from loftq.artifacts.staging import check_output, open_staging
from loftq.errors import UnknownNameError
from loftq.formats.artifact import read_artifact
from loftq.formats.checkpoint import parse_size
from loftq.formats.disk import explain_os_errors
from loftq.merging.logits import checked_difference
from loftq.merging.report import MergeReport
from loftq.merging.targets import TARGETS
from loftq.planning.run import check_resume


def merge(
    folder: str | Path,
    adapter: str | Path | None = None,
    *,
    to: str,
    output: str | Path,
    allow_rounding: bool = False,
    check: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    max_shard_size: str = "5GB",
    quiet: bool = False,
) -> MergeReport:
    """Merge an adapter (default: the initial one) into the backbone of `folder`, and write `output`.

    `to` is one of `TARGETS`. `folder` is one of ours, or a GPTQ checkpoint. One linear is in memory at a time; `check`
    then compares the logits of a few tokens before and after, for which each model is loaded once. Raises LoftQError,
    and leaves no output where the check fails.
    """
    started = time.perf_counter()
    if to not in TARGETS:
        raise UnknownNameError("target", to, TARGETS)
    check_resume(resume, overwrite)
    out = Path(output)
    check_output(out, resume=resume, overwrite=overwrite)
    target = TARGETS[to](open_pair(Path(folder), adapter), parse_size(max_shard_size))
    notes = target.notes()
    lost = target.check(allow_rounding)
    fingerprint = target.fingerprint()
    with open_staging(out, fingerprint, overwrite=overwrite) as staging:
        difference = None
        if not staging.ready:
            target.write(staging, quiet)
            target.check_sources(fingerprint)
            if check and target.comparable:
                difference = checked_difference(target, staging)
        staging.publish()
    with explain_os_errors(out, action="read"):
        files = read_artifact(out).manifest["files"]
    nbytes = sum(entry["bytes"] for name, entry in files.items() if name.endswith(target.suffix))
    layers, seconds = len(target.pair.adapter.modules), time.perf_counter() - started
    return MergeReport(out, to, nbytes, layers, difference, lost, notes, seconds)
