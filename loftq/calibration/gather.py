"""Calibrate: run the full-precision model over windows of text, and keep statistics of the inputs of its linears.

One pass computes the second moment of the inputs of every layer that a plan quantizes, and records the answers of the
model for a later distillation. Only one block of layers and its moments are in memory at a time, beside the weights
outside the blocks and one activation for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from loftq.calibration.block_weights import changed_tensors, computing_dtype
from loftq.calibration.conversations import prepare_conversations
from loftq.calibration.forward import Forward, ForwardHere, WorkerLostError
from loftq.calibration.input_files import InputFiles, advice_on_dtype
from loftq.calibration.progress import PROGRESS, Progress
from loftq.calibration.routed_tokens import PRIOR
from loftq.calibration.sizes import statistics_bytes
from loftq.calibration.statistics import (
    AGAIN,
    RECORD,
    TEACHER,
    VERSION,
    Statistics,
    config_digest,
    headers_digest,
    missing_modules,
    open_statistics,
    read_record,
)
from loftq.calibration.windows import Calibration, prepare
from loftq.display import few_of
from loftq.errors import ArtifactError, ClusterError, SourceError
from loftq.formats.disk import explain_os_errors, move_into_place, scratch_beside, write_whole
from loftq.formats.scan import hash_of
from loftq.formats.schema import json_text
from loftq.formats.space import check_space
from loftq.models.lockstep import Batch, find_blocks
from loftq.planning.plan import Plan
from loftq.planning.run import Run

BATCH_TOKENS = 2048  # number of tokens that run at once; more tokens do not make the matrix products faster


def gather(
    plan: Plan,
    calibration: Calibration,
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
    quiet: bool = False,
    forward: Forward | None = None,
) -> Statistics:
    """Gather the statistics of a plan's model on the windows of a calibration in a folder, and open them.

    A folder that already has them is reused; one of the same model and calibration that lacks a layer is replaced. If
    another run is gathering into the folder, this one waits for it; an interrupted run is continued. The model runs in
    float32 on the CPU and in the compute dtype elsewhere, with a progress bar on stderr unless `quiet`. `forward` runs
    it, by default in this process. Raises the errors of `open_statistics` for a folder of another model or calibration,
    SourceError for a model whose activations are not finite, and OutputError if the disk is full.
    """
    statistics = _complete_statistics(plan, calibration, folder)
    if statistics is not None:
        return statistics
    with explain_os_errors(folder, "--statistics"), scratch_beside(folder, PROGRESS) as scratch:
        statistics = _complete_statistics(plan, calibration, folder)  # another run may have gathered them meanwhile
        if statistics is not None:
            return statistics
        needed = statistics_bytes(plan, calibration.tokens, answered=not calibration.examples)
        check_space(folder, needed, "--statistics", scratch)
        here = ForwardHere(plan, torch.device(device), trust_remote_code)
        arguments = scratch, plan, calibration, torch.device(device), quiet, forward or here
        if not _gather_into(*arguments):
            _gather_into(*arguments)  # from the beginning
        move_into_place(scratch, folder)
        return open_statistics(folder, plan, calibration)


def _complete_statistics(plan: Plan, calibration: Calibration, folder: Path) -> Statistics | None:
    """The statistics in a folder if they cover all layers of a plan; None if the folder may be written or replaced."""
    if (folder / RECORD).is_file():
        lacking = missing_modules(read_record(folder), plan)
        checked_plan = replace(plan, layers=()) if lacking else plan
        statistics = open_statistics(folder, checked_plan, calibration)
        for name in changed_tensors(checked_plan, statistics.record["weights"]):
            raise ArtifactError(f"{folder} was gathered with a different {name}: {AGAIN}")
        return None if lacking else statistics
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(
            f"{folder} exists and is not a folder of calibration statistics: name another folder with --statistics"
        )
    return None


def _gather_into(
    folder: Path, plan: Plan, calibration: Calibration, device: torch.device, quiet: bool, forward: Forward
) -> bool:
    """Gather the statistics. Returns False, and empties the folder, if an interrupted run could not be continued."""
    dtype = computing_dtype(plan, device)
    head = _head(plan, calibration, dtype)
    inputs = {"files": plan.source.file_states(), "modules": list(plan.observed)}
    while True:
        progress = Progress(folder, {**head, **inputs, "device": device.type})
        resumed = progress.rounds > 0
        try:
            modules, digests = _run(folder, plan, calibration, dtype, progress, quiet, forward)
            break
        except WorkerLostError:
            continue
        except ClusterError:
            raise  # another run continues from the progress
        except Exception as error:
            progress.forget()
            if resumed and not isinstance(error, (OSError, MemoryError)):
                return False
            raise
    progress.finish()
    unreached = [module for module in plan.observed if module not in modules]
    files = {row["file"] for row in modules.values()} | (set() if calibration.examples else {TEACHER})
    record = {
        **head,
        "weights": digests,
        "modules": {**modules, **{name: {"file": None, "count": 0} for name in unreached}},
        "notes": [*calibration.notes, *_never_reached(unreached), *_rarely_reached(modules, plan)],
        "sha256": {name: hash_of(folder / name) for name in files},
    }
    write_whole(folder / RECORD, json_text(record, indent=1, sort_keys=True) + "\n")
    return True


def _head(plan: Plan, calibration: Calibration, dtype: torch.dtype) -> dict[str, Any]:
    """The part of a record that is known before the model runs."""
    return {
        "version": VERSION,
        "source": {
            "name": plan.source.name,
            "revision": plan.source.revision,
            "headers_sha256": headers_digest(plan.source.checkpoint),
            "config_sha256": config_digest(plan.source.folder),
        },
        "text": calibration.text,
        "settings": calibration.settings,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("loftq", "torch", "transformers")},
    }


def _run(
    folder: Path,
    plan: Plan,
    calibration: Calibration,
    dtype: torch.dtype,
    progress: Progress,
    quiet: bool,
    forward: Forward,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Run the model and write moments and answers.

    Returns the file and the number of input vectors of each module, and the SHA-256 of each tensor that was read.
    """
    size = max(1, BATCH_TOKENS // calibration.sequence_length)
    batches: Sequence[Batch] = calibration.examples or [
        _batch(plan, part) for part in torch.split(calibration.windows, size)
    ]
    blocks = find_blocks(plan.model, [layer.module for layer in plan.linears])
    steps, served = (len(batches) * rounds for rounds in (max(1, len(blocks)), progress.rounds))
    bar = tqdm(total=steps, initial=served, unit="block", disable=quiet, dynamic_ncols=True, desc="calibration")
    files = InputFiles(folder, plan, dtype, progress)
    with bar:
        answers, digests = forward(batches, files, progress, bar)
    if any(bool(tensor.isnan().any()) for answer in answers for tensor in answer.values()):
        raise SourceError(f"calibration: {plan.source.name} answers with NaN {advice_on_dtype(dtype)}")
    if calibration.examples:  # of different lengths, and with images: they teach nothing later
        return files.modules, digests
    token_ids = {name: tensor.int() for name, tensor in _joined(batches).items() if name.endswith("_ids")}
    save_file({**token_ids, **_joined(answers)}, folder / TEACHER)
    return files.modules, digests


def _never_reached(modules: list[str]) -> Iterator[str]:
    if modules:
        yield f"the calibration text never reached {few_of(modules)}"


def _rarely_reached(modules: dict[str, dict[str, Any]], plan: Plan) -> Iterator[str]:
    """The experts whose moments are mostly those of all tokens of their layer."""
    counts = {name: row["experts"] for name, row in modules.items() if "experts" in row}
    few = [
        f"{name}.{expert}"
        for name, tokens in counts.items()
        for expert, count in enumerate(tokens)
        if count < PRIOR * plan.observed[name]
    ]
    if few:
        total = sum(map(len, counts.values()))
        yield (
            f"{len(few)} of {total} experts got few tokens of the calibration text, and lean on all tokens of "
            f"their layer: {few_of(few)}"
        )


def _batch(plan: Plan, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of the model for some windows of token ids."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config: Any = plan.model.config
    if config.is_encoder_decoder:
        tokens = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad"))
        start = next((token for token in tokens if token is not None), 0)
        batch["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
    if plan.model_type == "gemma3":
        batch["token_type_ids"] = torch.zeros_like(ids)  # all tokens are text
    return batch


def _joined(parts: Sequence[Batch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]).cpu().contiguous() for name in parts[0]}


def calibrate(plan: Plan, folder: Path, run: Run, forward: Forward | None = None) -> Statistics | None:
    """The statistics of the layers' inputs, gathered now or by an earlier run. None if the recipe has no text.

    They are kept beside the output `folder`, unless the run names another folder. `forward` is that of `gather`.
    """
    if plan.recipe.calibration is None:
        return None
    text = windows_of(plan, run.trust_remote_code)
    statistics_folder = (
        Path(run.statistics) if run.statistics else folder.parent / f"{plan.source.label}-calibration-{text.key}"
    )
    return gather(
        plan,
        text,
        statistics_folder,
        run.device,
        trust_remote_code=run.trust_remote_code,
        quiet=run.quiet,
        forward=forward,
    )


def windows_of(plan: Plan, trust_remote_code: bool) -> Calibration:
    """The calibration text of a plan's recipe, cut into windows, or its conversations with images."""
    recipe = plan.recipe
    text = cast(str, recipe.calibration)
    options: dict[str, Any] = {
        "tokens": recipe.calibration_tokens,
        "sequence_length": recipe.sequence_length,
        "seed": recipe.seed,
        "trust_remote_code": trust_remote_code,
    }
    return prepare_conversations(plan, text, **options) or prepare(plan, text, **options)
