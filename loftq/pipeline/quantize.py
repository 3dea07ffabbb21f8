"""`loftq quantize`: a checkpoint streams in, a quantized backbone and its adapter stream out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from loftq.core.solver import solve
from loftq.errors import CheckpointError, OptionError
from loftq.formats import adapter, artifact, bitsandbytes
from loftq.formats.checkpoint import ShardWriter, index_text
from loftq.pipeline.card import card_text
from loftq.pipeline.plan import Layer, Plan, make_plan, passed_spec
from loftq.pipeline.recipe import Recipe
from loftq.pipeline.report import Report, layer_row, peak_memory, planned_row, totals
from loftq.pipeline.source import Source, find_source
from loftq.pipeline.staging import Staging, check_output, open_staging

SAVE_DIR = "model_zoo/loftq"
_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "numba", "scipy")


def quantize(
    model: str | None = None,
    *,
    bits: int = 4,
    rank: int = 16,
    iters: int = 5,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    double_quant: bool = False,
    block_size: int = 64,
    compute_dtype: str = "bfloat16",
    target_modules: Sequence[str] | None = None,
    exclude_modules: Sequence[str] = (),
    svd: str = "krylov",
    seed: int = 0,
    max_shard_size: str = "5GB",
    save_dir: str | Path = SAVE_DIR,
    output: str | Path | None = None,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Report:
    """Quantize a causal language model and initialize its LoRA adapter with LoftQ.

    `model` is a folder or a Hub id; without one, the default model of the zoo. The result is the folder
    `output`, by default `save_dir/{name}-{bits}bit-{rank}rank`. The settings are those of
    `loftq quantize --help`. On one machine the same source and settings give the same bytes, on any number
    of workers, resumed or not. Returns the report; raises LoftQError.
    """
    started = time.perf_counter()
    recipe = Recipe(
        bits=bits,
        rank=rank,
        iters=iters,
        alpha=alpha,
        rslora=rslora,
        dropout=dropout,
        double_quant=double_quant,
        block_size=block_size,
        compute_dtype=compute_dtype,
        target_modules=None if target_modules is None else tuple(target_modules),
        exclude_modules=tuple(exclude_modules),
        svd=svd,
        seed=seed,
        max_shard_size=max_shard_size,
    )
    chosen = _device(device)
    count = _workers(workers, chosen)
    if resume and overwrite:
        raise OptionError("--resume and --overwrite exclude each other: finish the run, or start again")
    if output is not None and not dry_run:
        check_output(Path(output), resume=resume, overwrite=overwrite)
    source = find_source(
        model, revision=revision, token=token, trust_remote_code=trust_remote_code, headers_only=dry_run
    )
    folder = Path(output) if output else Path(save_dir) / f"{source.label}-{bits}bit-{rank}rank"
    if not dry_run:
        check_output(folder, resume=resume, overwrite=overwrite)
    plan = make_plan(source, recipe, trust_remote_code=trust_remote_code)
    if dry_run:
        rows = [planned_row(plan, layer) for layer in plan.layers]
        return Report(folder, source.name, recipe.to_dict(), totals(plan), rows, plan.notes, plan.memory(count))
    with open_staging(folder, _fingerprint(plan, chosen), overwrite=overwrite) as staging:
        if not staging.ready:
            _solve_all(plan, staging, chosen, count, quiet)
            rows = [staging.done[layer.tensor]["row"] for layer in plan.layers]
            _finish(plan, staging, rows, folder, trust_remote_code)
        else:
            rows = [staging.done[layer.tensor]["row"] for layer in plan.layers]
        staging.publish()
    seconds = time.perf_counter() - started
    sums = totals(plan, rows)
    return Report(folder, source.name, recipe.to_dict(), sums, rows, plan.notes, peak_memory(chosen), seconds)


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"--device {device}: not available here ({reason}); cpu always is") from error
    return chosen


def _workers(workers: int | None, device: torch.device) -> int:
    if workers is not None and not 1 <= workers <= 1024:
        raise OptionError(f"--workers {workers}: expected 1 to 1024")
    if workers is None:
        return min(os.cpu_count() or 1, 8) if device.type == "cpu" else 1
    return workers


def _fingerprint(plan: Plan, device: torch.device) -> dict[str, Any]:
    """All that the bytes of the result depend on: an unfinished run is resumed only where it is the same."""
    checkpoint = plan.source.checkpoint
    states = {file: (checkpoint.folder / file).stat() for file in sorted(set(checkpoint.files.values()))}
    return {
        "source": {
            "name": plan.source.name,
            "revision": plan.source.revision,
            "files": {file: [state.st_size, state.st_mtime_ns] for file, state in states.items()},
        },
        "recipe": plan.recipe.to_dict(),
        "device": device.type,
        "versions": {"loftq": version("loftq"), "torch": torch.__version__},
    }


def _solve_all(plan: Plan, staging: Staging, device: torch.device, workers: int, quiet: bool) -> None:
    """Run a job for each tensor that is not in place yet."""
    layers = {layer.tensor: layer for layer in plan.layers}
    tensors = plan.source.checkpoint.tensors
    names = [*layers, *plan.passed]
    left = [name for name in names if name not in staging.done]
    everything = sum(tensors[name].numel for name in names)
    begun = everything - sum(tensors[name].numel for name in left)
    bar = tqdm(total=everything, initial=begun, unit="w", unit_scale=True, disable=quiet, dynamic_ncols=True)
    shards = [*plan.backbone, plan.adapter]
    with bar, _one_thread_each(), ShardWriter(staging.folder, shards) as writer:

        def work(name: str) -> None:
            layer = layers.get(name)
            record = _solve_layer(plan, layer, writer, device) if layer else _pass_through(plan, name, writer)
            staging.note(name, record)
            bar.set_postfix_str(layer.module if layer else name, refresh=False)
            bar.update(tensors[name].numel)

        _run_jobs(work, left, workers)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """One torch thread a job: a matrix product's last bits depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_jobs(work: Callable[[str], None], names: Sequence[str], workers: int) -> None:
    """Run independent, idempotent jobs; the first failure stops those not yet begun and is raised."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loftq-solver")
    futures: list[Future[None]] = []
    try:
        futures = [pool.submit(work, name) for name in names]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _solve_layer(plan: Plan, layer: Layer, writer: ShardWriter, device: torch.device) -> dict[str, Any]:
    recipe = plan.recipe
    quantizer = recipe.quantizer
    stored = plan.source.checkpoint.read(layer.tensor)
    digest = _digest(stored)
    weight = stored.to(device, torch.float32).contiguous()
    _check_finite(weight, layer.tensor, plan.source)
    seed = int.from_bytes(hashlib.sha256(f"{recipe.seed} {layer.module}".encode()).digest()[:8], "little") >> 1
    solution = solve(weight, quantizer, recipe.rank, recipe.iters, recipe.scaling, svd=recipe.svd, seed=seed)
    packed = bitsandbytes.tensors(layer.module, layer.shape, quantizer, recipe.dtype, solution.codes, solution.scales)
    factors = dict(zip(adapter.keys(layer.module), (solution.a, solution.b), strict=True))
    for name, tensor in {**packed, **factors}.items():
        writer.write(name, tensor)
    return {"sha256": digest, "row": layer_row(plan, layer, solution.trace)}


def _pass_through(plan: Plan, name: str, writer: ShardWriter) -> dict[str, Any]:
    stored = plan.source.checkpoint.read(name)
    spec = passed_spec(plan.source.checkpoint.tensors[name], plan.passed[name], plan.recipe.dtype)
    if stored.is_floating_point():
        _check_finite(stored, name, plan.source)
    cast = stored.to(spec.dtype)
    if cast.is_floating_point() and stored.dtype != cast.dtype and not _is_finite(cast):
        raise OptionError(f"tensor {name!r} does not fit --compute-dtype {plan.recipe.compute_dtype}: use bfloat16")
    writer.write(spec.name, cast)
    return {"sha256": _digest(stored)}


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _check_finite(tensor: torch.Tensor, name: str, source: Source) -> None:
    if not _is_finite(tensor):
        where = source.checkpoint.folder / source.checkpoint.files[name]
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"tensor {name!r} in {where} holds {count} NaN or Inf: the checkpoint is damaged")


def _finish(
    plan: Plan, staging: Staging, rows: Sequence[Mapping[str, Any]], folder: Path, trust_remote_code: bool
) -> None:
    """Make the small files: configs, tokenizer, card, and the manifest, which hashes all the others."""
    recipe = plan.recipe
    for path in plan.source.side_files(trust_remote_code):
        shutil.copyfile(path, staging.folder / path.name)
    config = json.loads((plan.source.folder / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = recipe.compute_dtype
    config["quantization_config"] = bitsandbytes.quantization_config(recipe.quantizer, recipe.dtype, plan.skip_modules)
    staging.write_text("config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    if len(plan.backbone) > 1:
        staging.write_text("model.safetensors.index.json", index_text(plan.backbone))
    staging.write_text(
        f"{adapter.FOLDER}/{adapter.CONFIG}",
        adapter.config_text(
            str(folder.resolve()),
            plan.target_modules,
            rank=recipe.rank,
            alpha=recipe.lora_alpha,
            rslora=recipe.rslora,
            dropout=recipe.dropout,
            task_type=plan.task_type,
        ),
    )
    sums = totals(plan, rows)
    staging.write_text("README.md", card_text(plan, sums, rows, plan.notes))
    files = artifact.describe_files(staging.folder, [name for name in staging.files() if name != artifact.MANIFEST])
    shards = {shard.file: files[shard.file]["sha256"] for shard in plan.backbone}
    manifest = {
        "format_version": artifact.VERSION,
        "kind": "qlora",
        "versions": {"loftq": version("loftq"), **{name: version(name) for name in _VERSIONS}},
        "source": {
            "model": plan.source.name,
            "model_type": plan.model_type,
            "revision": plan.source.revision,
            "sha256": artifact.combine_hashes({name: staging.done[name]["sha256"] for name in staging.done}),
        },
        "recipe": recipe.to_dict(),
        "backbone_sha256": artifact.combine_hashes(shards),
        "totals": sums,
        "layers": list(rows),
        "notes": list(plan.notes),
        "files": files,
    }
    staging.write_text(artifact.MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
