"""Calibrate: run the full-precision model over windows of text, and keep what its linears see.

For every layer that a plan quantizes, the second moment of its inputs; in the same pass, what the model answers, for
a later distillation. Blocks of layers are in memory one at a time, and so are their moments: what stays is what lies
outside the blocks, and one activation for each token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from loftq.calibration import statistics
from loftq.calibration.block_weights import BlockWeights, changed
from loftq.calibration.observer import InputObserver, advice_on_dtype
from loftq.calibration.progress import PROGRESS, Progress
from loftq.calibration.statistics import AGAIN, RECORD, TEACHER, Statistics, open_statistics, read_record
from loftq.calibration.windows import Calibration, prepare
from loftq.display import few_of
from loftq.errors import ArtifactError, SourceError
from loftq.formats.disk import explain_os_errors, move_into_place, scratch_beside
from loftq.models.lockstep import run as run_in_lockstep
from loftq.planning.plan import Plan
from loftq.planning.run import Run

BATCH_TOKENS = 2048  # that run at once: more make the products no faster


def gather(
    plan: Plan,
    calibration: Calibration,
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Statistics:
    """The statistics of a plan's model on a calibration's windows, in a folder, which is reused where it has them.

    The model runs in float32 on the CPU and in the compute dtype elsewhere, with a progress bar on stderr unless
    `quiet`. A folder of the same model and calibration that lacks a layer is made again. Raises what `open_statistics`
    does for one of another, SourceError for a model whose activations are not finite, and OutputError where the disk is
    full. Another run that is gathering the same is waited for; one that was cut off is gone on with.
    """
    known = _known(plan, calibration, folder)
    if known is not None:
        return known
    with explain_os_errors(folder, "--statistics"), scratch_beside(folder, PROGRESS) as scratch:
        known = _known(plan, calibration, folder)  # what another run has gathered meanwhile
        if known is not None:
            return known
        asked = scratch, plan, calibration, torch.device(device), trust_remote_code, quiet
        if not _gather_into(*asked):
            _gather_into(*asked)  # from the beginning
        move_into_place(scratch, folder)
        return open_statistics(folder, plan, calibration)


def _known(plan: Plan, calibration: Calibration, folder: Path) -> Statistics | None:
    """The statistics that a folder has of all of a plan's layers; None where it is free, or ours to replace."""
    if (folder / RECORD).is_file():
        lacking = statistics.lacks(read_record(folder), plan)
        ours = replace(plan, layers=()) if lacking else plan
        found = open_statistics(folder, ours, calibration)
        for name in changed(ours, found.record["weights"]):
            raise ArtifactError(f"{folder} was gathered with another {name}: {AGAIN}")
        return None if lacking else found
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} is in the way and holds no calibration statistics: name another folder")
    return None


def _gather_into(
    folder: Path, plan: Plan, calibration: Calibration, device: torch.device, trust_remote_code: bool, quiet: bool
) -> bool:
    """Whether that went well. Where a model does not go on from what an earlier run has left, that is removed."""
    weights = BlockWeights(plan, device, trust_remote_code=trust_remote_code)
    head = _head(plan, calibration, weights)
    seen = {"files": plan.source.file_states(), "modules": [layer.module for layer in plan.layers]}
    progress = Progress(folder, {**head, **seen, "device": device.type})
    resumed = progress.rounds > 0
    try:
        found = _run(folder, plan, calibration, weights, progress, quiet)
    except Exception as error:
        progress.forget()
        if resumed and not isinstance(error, (OSError, MemoryError)):
            return False
        raise
    progress.finish()
    never = [layer.module for layer in plan.layers if layer.module not in found]
    record = {
        **head,
        "weights": weights.digests,
        "modules": {**found, **{name: {"file": None, "count": 0} for name in never}},
        "notes": [*calibration.notes, *_never_reached(never)],
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return True


def _head(plan: Plan, calibration: Calibration, weights: BlockWeights) -> dict[str, Any]:
    """What a record says before anything is run."""
    return {
        "version": statistics.VERSION,
        "source": {
            "name": plan.source.name,
            "revision": plan.source.revision,
            "headers_sha256": statistics.headers_digest(plan.source.checkpoint),
            "config_sha256": statistics.config_digest(plan.source.folder),
        },
        "text": calibration.text,
        "settings": calibration.settings,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("loftq", "torch", "transformers")},
    }


def _run(
    folder: Path, plan: Plan, calibration: Calibration, weights: BlockWeights, progress: Progress, quiet: bool
) -> dict[str, dict[str, Any]]:
    """Write moments and answers: the file of each module, and how many vectors it has seen."""
    size = max(1, BATCH_TOKENS // calibration.sequence_length)
    batches = [_batch(plan, weights, part) for part in torch.split(calibration.windows, size)]
    steps, done = (len(batches) * rounds for rounds in (max(1, len(weights.blocks)), progress.rounds))
    bar = tqdm(total=steps, initial=done, unit="block", disable=quiet, dynamic_ncols=True, desc="calibration")
    answers: list[dict[str, torch.Tensor]] = [{} for _ in batches]
    with bar:
        found = InputObserver(plan, weights, folder, bar, answers, progress)
        with found.watching():
            run_in_lockstep(weights.core, batches, weights.blocks, found, progress)
        found.save(None)
    ids = {name: tensor.int() for name, tensor in _joined(batches).items() if name.endswith("_ids")}
    answered = _joined(answers)
    if any(bool(tensor.isnan().any()) for tensor in answered.values()):
        raise SourceError(f"calibration: answers of {plan.source.name} are not numbers {advice_on_dtype(weights)}")
    save_file({**ids, **answered}, folder / TEACHER)
    return found.modules


def _never_reached(modules: list[str]) -> Iterator[str]:
    if modules:
        yield f"calibration never reached {few_of(modules)}"


def _batch(plan: Plan, weights: BlockWeights, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model takes."""
    ids = windows.to(weights.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config: Any = weights.model.config
    if config.is_encoder_decoder:
        named = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad"))
        start = next((token for token in named if token is not None), 0)
        batch["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
    if plan.model_type == "gemma3":
        batch["token_type_ids"] = torch.zeros_like(ids)  # text alone
    return batch


def _joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]).cpu().contiguous() for name in parts[0]}


def calibrate(plan: Plan, folder: Path, run: Run) -> Statistics | None:
    """The statistics of the layers' inputs, gathered now or by an earlier run; None where no text is given.

    They are kept beside the output `folder`, unless the run names another folder.
    """
    if plan.recipe.calibration is None:
        return None
    text = windows_of(plan, run.trust_remote_code)
    where = Path(run.statistics) if run.statistics else folder.parent / f"{plan.source.label}-calibration-{text.key}"
    return gather(plan, text, where, run.device, trust_remote_code=run.trust_remote_code, quiet=run.quiet)


def windows_of(plan: Plan, trust_remote_code: bool) -> Calibration:
    """The text of a plan's recipe, cut into windows."""
    recipe = plan.recipe
    return prepare(
        plan,
        cast(str, recipe.calibration),
        tokens=cast(int, recipe.calibration_tokens),
        sequence_length=cast(int, recipe.sequence_length),
        seed=recipe.seed,
        trust_remote_code=trust_remote_code,
    )
