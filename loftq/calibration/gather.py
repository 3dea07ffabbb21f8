"""Calibrate: run the full-precision model over windows of text, and keep what its linears see.

For every layer that a plan quantizes, the second moment of its inputs; in the same pass, what the model answers, for
a later distillation. Blocks of layers are in memory one at a time, and so are their moments: what stays is what lies
outside the blocks, and one activation for each token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from loftq.calibration import statistics
from loftq.calibration.block_weights import BlockWeights, changed
from loftq.calibration.progress import PROGRESS, Progress
from loftq.calibration.statistics import AGAIN, RECORD, TEACHER, Statistics, open_statistics, read_panels, read_record
from loftq.calibration.windows import Calibration
from loftq.core.moments import Moment
from loftq.display import few_of
from loftq.errors import ArtifactError, SourceError
from loftq.formats.disk import explain_os_errors, move_into_place, scratch_beside
from loftq.models.lockstep import run
from loftq.planning.plan import Plan

TOP = 256  # answers that are kept at each position
BATCH_TOKENS = 2048  # that run at once: more make the products no faster
VOCABULARY = ("causal-lm", "seq2seq-lm", "masked-lm")  # tasks whose models answer with a token


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
        found = _Gathering(plan, weights, folder, bar, answers, progress)
        with found.watching():
            run(weights.core, batches, weights.blocks, found, progress)
        found.save(None)
    ids = {name: tensor.int() for name, tensor in _joined(batches).items() if name.endswith("_ids")}
    answered = _joined(answers)
    if any(bool(tensor.isnan().any()) for tensor in answered.values()):
        raise SourceError(f"calibration: answers of {plan.source.name} are not numbers {_cure(weights)}")
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


class _Input(NamedTuple):
    """A tensor that modules got, and how often it had been written to by then."""

    tensor: torch.Tensor
    version: int
    modules: list[str]


class _Gathering:
    """Sums up what the layers see; a visitor of `lockstep.run`.

    Inputs are held until their batch has passed the block, for what modules share one is known only then. A module
    may get several, and share each with others (DeBERTa's projections of positions): each set of modules has a sum
    of its own, and a module's moment is that of all the sets it is in.
    """

    def __init__(
        self,
        plan: Plan,
        weights: BlockWeights,
        folder: Path,
        bar: Any,
        answers: list[dict[str, torch.Tensor]],
        progress: Progress,
    ) -> None:
        self.modules = progress.modules  # the file of each, and how many vectors it has seen
        weights.digests |= progress.digests
        self._progress = progress
        self._plan, self._weights, self._folder, self._bar, self._answers = plan, weights, folder, bar, answers
        self._inputs: dict[int, _Input] = {}
        self._sums: dict[tuple[str, ...], Moment] = {}
        self._files = progress.files

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See what the plan's layers get."""
        handles = [
            self._weights.model.get_submodule(layer.module).register_forward_pre_hook(
                partial(self._see, layer.module), with_kwargs=True
            )
            for layer in self._plan.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensor = args[0] if args else next(iter(kwargs.values()))
        found = self._inputs.setdefault(id(tensor), _Input(tensor, tensor._version, []))
        self._check_unchanged(found)
        found.modules.append(name)

    def enter(self, block: str) -> None:
        self._weights.load(block)
        self._progress.begin()

    def keep(self, index: int, output: Any) -> None:
        self._progress.keep(index, output)

    def leave(self, block: str, rounds: int) -> None:
        self._weights.drop(block)
        self.save(block)
        self._progress.end(rounds, len(self._answers), self.modules, self._weights.digests, self._files)

    def passed(self, block: str | None) -> None:
        for found in self._inputs.values():
            self._check_unchanged(found)
            if found.tensor.numel():
                key, size = tuple(found.modules), found.tensor.shape[-1]
                self._sums.setdefault(key, Moment(size, found.tensor.device)).add(found.tensor)
        self._inputs.clear()
        if block is not None or not self._weights.blocks:
            self._bar.update(1)

    def finish(self, index: int, output: Any) -> None:
        self._answers[index] = answer_of(output, self._plan.task.name in VOCABULARY)

    def save(self, block: str | None) -> None:
        """Write the moments of a block's layers, or of all that are left, and forget their sums."""
        taken = [key for key in self._sums if block is None or key[0].startswith(f"{block}.")]
        sums = {key: self._sums.pop(key) for key in taken}
        sharing: dict[tuple[Any, ...], list[str]] = {}
        for module in dict.fromkeys(module for key in sums for module in key):
            earlier = self.modules.get(module, {}).get("file")  # of an earlier visit to the block
            sets = tuple(key for key in sums for name in key if name == module)
            sharing.setdefault((earlier, sets), []).append(module)
        for (earlier, sets), modules in sharing.items():
            own = len(sets) == 1 and earlier is None  # then nothing is added to a sum that others may need
            total = sums[sets[0]] if own else Moment(sums[sets[0]].size, sums[sets[0]].panels[0].device)
            for key in () if own else sets:
                total.merge(sums[key])
            if earlier is not None:
                total.merge_mean(read_panels(self._folder / earlier), self.modules[modules[0]]["count"])
            self._write(total, modules)
        for earlier in {earlier for earlier, _ in sharing if earlier is not None}:
            (self._folder / earlier).unlink()

    def _write(self, total: Moment, modules: list[str]) -> None:
        panels = total.mean()
        if not all(bool(torch.isfinite(panel).all()) for panel in panels):
            raise SourceError(f"calibration: the inputs of {modules[0]} are not finite {_cure(self._weights)}")
        self._files += 1
        file = f"moment-{self._files:05d}.safetensors"
        save_file({str(i): panel for i, panel in enumerate(panels)}, self._folder / file)
        for module in modules:
            self.modules[module] = {"file": file, "count": total.count}

    def _check_unchanged(self, found: _Input) -> None:
        if found.tensor._version != found.version:
            raise SourceError(
                f"{found.modules[0]} computes on an input that is overwritten later in its block: "
                f"add --exclude-modules {found.modules[0].rpartition('.')[2]}"
            )


def _cure(weights: BlockWeights) -> str:
    dtype = str(weights.dtype).removeprefix("torch.")
    cure = "damaged weights" if dtype == "float32" else "use --compute-dtype bfloat16, or --device cpu"
    return f"in {dtype}: {cure}"


def answer_of(output: Any, vocabulary: bool) -> dict[str, torch.Tensor]:
    """The greatest log-probabilities at each position, or the last hidden states, on the CPU."""
    if not vocabulary:
        return {"hidden": output[0].to("cpu", torch.bfloat16)}
    logits = output.logits
    k = min(TOP, logits.shape[-1])
    values, indices = [], []
    for rows in torch.split(logits.flatten(0, 1), 512):  # a vocabulary in float32 is large
        rows = rows.float()
        top = rows.topk(k)
        values.append((top.values - rows.logsumexp(-1, keepdim=True)).to("cpu", torch.float16))
        indices.append(top.indices.to("cpu", torch.int32))
    shape = (*logits.shape[:2], k)
    return {"values": torch.cat(values).view(shape), "indices": torch.cat(indices).view(shape)}
