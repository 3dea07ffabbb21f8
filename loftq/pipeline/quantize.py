"""`loftq quantize`: a checkpoint streams in, a quantized backbone and its adapter stream out."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loftq.errors import OptionError, OutputError
from loftq.formats import artifact
from loftq.formats.adapter import CONFIG, FOLDER, config_text
from loftq.formats.checkpoint import INDEX, index_text
from loftq.pipeline.allocate import allocate
from loftq.pipeline.card import card_text
from loftq.pipeline.jobs import solve_all
from loftq.pipeline.plan import Plan, make_plan
from loftq.pipeline.recipe import Recipe
from loftq.pipeline.report import Report, peak_memory, planned_row, report, totals
from loftq.pipeline.source import find_source, side_files
from loftq.pipeline.staging import Staging, check_output, is_begun, open_staging

SAVE_DIR = "model_zoo/loftq"
_VERSIONS = ("loftq", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numba", "scipy")


def quantize(
    model: str | None = None,
    *,
    bits: float = 4,
    allocation: str | None = None,
    adapter: str = "lora",
    rank: int = 16,
    pool_size: int | None = None,
    iters: int = 5,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    quant_type: str | None = None,
    block_size: int | None = None,
    group_size: int | None = None,
    zero_point: str | None = None,
    double_quant: bool = False,
    format: str | None = None,
    compute_dtype: str = "bfloat16",
    target_modules: Sequence[str] | None = None,
    exclude_modules: Sequence[str] = (),
    task: str | None = None,
    num_labels: int | None = None,
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
    """Quantize a model and initialize its LoRA adapter with LoftQ.

    `model` is a folder or a Hub id; without one, the default model of the zoo. The result is the folder
    `output`, by default `save_dir/{name}-{bits}bit-{rank}rank`. `task` is one of `loftq.models.tasks.TASKS`, by
    default that of the checkpoint's own architecture. The settings are those of
    `loftq quantize --help`. On one machine the same source and settings give the same bytes, on any number
    of workers, resumed or not. Returns the report; raises LoftQError.
    """
    started = time.perf_counter()
    recipe = Recipe(
        bits=bits,
        allocation=allocation,
        adapter=adapter,
        rank=rank,
        pool_size=pool_size,
        iters=iters,
        alpha=alpha,
        rslora=rslora,
        dropout=dropout,
        quant_type=quant_type,
        block_size=block_size,
        group_size=group_size,
        zero_point=zero_point,
        double_quant=double_quant,
        format=format,
        compute_dtype=compute_dtype,
        target_modules=None if target_modules is None else tuple(target_modules),
        exclude_modules=tuple(exclude_modules),
        task=task,
        num_labels=num_labels,
        svd=svd,
        seed=seed,
        max_shard_size=max_shard_size,
    )
    if resume and overwrite:
        raise OptionError("--resume and --overwrite exclude each other: finish the run, or start again")
    chosen = _device(device)
    count = _workers(workers, chosen)
    if output is not None and not dry_run:
        check_output(Path(output), resume=resume, overwrite=overwrite)
    source = find_source(
        model, revision=revision, token=token, trust_remote_code=trust_remote_code, headers_only=dry_run
    )
    folder = Path(output) if output else Path(save_dir) / f"{source.label}-{bits:g}bit-{rank}rank"
    if not dry_run:
        check_output(folder, resume=resume, overwrite=overwrite)
    plan = make_plan(source, recipe, trust_remote_code=trust_remote_code)
    if recipe.allocation == "auto" and not dry_run:
        widths = allocate(plan, chosen, count, quiet)
        plan = make_plan(source, recipe, trust_remote_code=trust_remote_code, widths=widths)
    if dry_run:
        return report(plan, folder, [planned_row(plan, layer) for layer in plan.layers], plan.memory(count))
    if resume and not is_begun(folder) and (folder / artifact.MANIFEST).is_file():
        rows = _finished_rows(folder, plan)
    else:
        with open_staging(folder, _fingerprint(plan, chosen), overwrite=overwrite) as staging:
            if not staging.ready:
                solve_all(plan, staging, chosen, count, quiet)
                _finish(plan, staging, folder, trust_remote_code)
            rows = _rows(plan, staging)
            staging.publish()
    return report(plan, folder, rows, peak_memory(chosen), time.perf_counter() - started)


def _rows(plan: Plan, staging: Staging) -> list[dict[str, Any]]:
    return [staging.done[layer.tensor]["row"] for layer in plan.layers]


def _finished_rows(folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """The layers of a folder that is complete already, where it is the one that was asked for."""
    manifest = artifact.open_artifact(folder).manifest
    found, asked = manifest["recipe"], plan.recipe.to_dict()
    differing = [key for key in asked if found.get(key) != json.loads(json.dumps(asked[key]))]
    if (manifest["source"]["model"], manifest["source"]["revision"]) != (plan.source.name, plan.source.revision):
        differing.append("source")
    if differing:
        raise OutputError(
            f"{folder} is finished, with another {', '.join(differing)}: "
            "add --overwrite instead of --resume to make it again, or name another --output"
        )
    return list(manifest["layers"])


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
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
    names = ["config.json", *sorted(set(checkpoint.files.values()))]
    states = {name: (checkpoint.folder / name).stat() for name in names}
    return {
        "source": {
            "name": plan.source.name,
            "revision": plan.source.revision,
            "files": {file: [state.st_size, state.st_mtime_ns] for file, state in states.items()},
        },
        "recipe": plan.recipe.to_dict(),
        "device": device.type,
        "versions": {name: version(name) for name in ("loftq", "torch", "transformers")},
    }


def _config_text(plan: Plan) -> str:
    """The source's `config.json` with the class that was built, its labels, the dtype, and the quantization."""
    recipe = plan.recipe
    config = json.loads((plan.source.folder / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = recipe.compute_dtype
    config["architectures"] = [type(plan.model).__name__]
    if recipe.num_labels is not None:
        built: Any = plan.model.config
        config |= {"id2label": built.id2label, "label2id": built.label2id}
    config["quantization_config"] = plan.layout.quantization_config(
        recipe.grids[0], recipe.dtype, plan.skip_modules, plan.codebooks, plan.quantized_names
    )
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _finish(plan: Plan, staging: Staging, folder: Path, trust_remote_code: bool) -> None:
    """Make the small files: configs, tokenizer, card, and the manifest, which hashes all the others."""
    recipe = plan.recipe
    for path in side_files(plan.source.folder, trust_remote_code):
        shutil.copyfile(path, staging.folder / path.name)
    staging.write_text("config.json", _config_text(plan))
    if len(plan.backbone) > 1:
        staging.write_text(INDEX, index_text(plan.backbone))
    staging.write_text(
        f"{FOLDER}/{CONFIG}",
        config_text(
            str(folder.resolve()),
            plan.target_modules,
            rank=recipe.rank,
            alpha=recipe.lora_alpha,
            rslora=recipe.rslora,
            dropout=recipe.dropout,
            task_type=plan.task.peft_type,
            modules_to_save=plan.modules_to_save,
            pool_size=recipe.pool_size,
        ),
    )
    rows = _rows(plan, staging)
    sums = totals(plan, rows)
    staging.write_text("README.md", card_text(plan, sums, rows))
    names = [name for name in staging.files() if name != artifact.MANIFEST]
    files = artifact.describe_files(staging.folder, names)
    hashes = {name: record["sha256"] for name, record in staging.done.items() if name not in plan.created}
    manifest = {
        "format_version": artifact.VERSION,
        "kind": "qalora" if recipe.adapter == "qalora" else "qlora",
        "format": plan.format,
        "versions": {name: version(name) for name in _VERSIONS},
        "source": {
            "model": plan.source.name,
            "model_type": plan.model_type,
            "task": plan.task.name,
            "revision": plan.source.revision,
            "sha256": artifact.combine_hashes(hashes),
        },
        "recipe": recipe.to_dict(),
        "backbone_sha256": artifact.combine_hashes({s.file: files[s.file]["sha256"] for s in plan.backbone}),
        "totals": sums,
        "layers": rows,
        "notes": list(plan.notes),
        "files": files,
    }
    staging.write_text(artifact.MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
