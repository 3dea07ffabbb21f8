"""The small files of an artifact: configs, tokenizer, card, and the manifest, which lists the hashes of all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loftq.artifacts.backbone import Backbone
from loftq.artifacts.card import card_text
from loftq.artifacts.card_metadata import base_of
from loftq.artifacts.merged_card import merged_card_text
from loftq.artifacts.rows import totals_of
from loftq.artifacts.staging import Staging
from loftq.core.grid import Grid
from loftq.formats import artifact
from loftq.formats.adapter import CONFIG, FOLDER
from loftq.formats.adapter import config_text as adapter_config_text
from loftq.formats.checkpoint import INDEX, Shard, index_text
from loftq.formats.model_config import config_text, read_config
from loftq.formats.schema import json_text
from loftq.hub.source import side_files
from loftq.models.tasks import peft_type
from loftq.planning.plan import Plan

VERSIONS = ("loftq", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numba", "scipy")


def write_configs(plan: Plan, staging: Staging, folder: Path, trust_remote_code: bool) -> None:
    """Write the files that loaders of the backbone and the adapter read beside the weights."""
    recipe = plan.recipe
    for path in side_files(plan.source.folder, trust_remote_code):
        staging.copy(path, path.relative_to(plan.source.folder).as_posix())
    staging.write_text("config.json", _config_text(plan))
    if len(plan.backbone) > 1:
        staging.write_text(INDEX, index_text(plan.backbone))
    staging.write_text(
        f"{FOLDER}/{CONFIG}",
        adapter_config_text(
            str(folder.resolve()),
            plan.target_modules,
            rank=recipe.rank,
            alpha=recipe.alpha,
            rslora=recipe.rslora,
            dropout=recipe.dropout,
            task_type=peft_type(plan.task, plan.model),
            modules_to_save=plan.modules_to_save,
            pool_size=recipe.pool_size,
            target_parameters=plan.target_parameters,
            expert_rank=recipe.expert_rank,
            expert_alpha=recipe.expert_alpha if plan.target_parameters else None,
        ),
    )


def write_manifest(
    plan: Plan,
    staging: Staging,
    rows: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
) -> None:
    """Write the card and `loftq.json`.

    `measured` are totals of the run that are not sums over its layers; `calibration` holds the settings of the
    calibration with the number of tokens and the hashes of the text.
    """
    sums = {**totals_of(plan, rows), **measured}
    staging.write_text("README.md", card_text(plan, heading(plan), sums, rows))
    files, zero_blocks = staging.describe()
    hashes = {name: record["sha256"] for name, record in staging.done.items() if "sha256" in record}
    manifest = {
        **heading(plan),
        "versions": {name: version(name) for name in VERSIONS},
        "backbone_sha256": artifact.combine_hashes({s.file: files[s.file]["sha256"] for s in plan.backbone}),
        "totals": sums,
        "layers": list(rows),
        "notes": list(plan.notes),
        "calibration": calibration,
        "files": files,
        "zero_blocks": zero_blocks,
    }
    manifest["source"]["sha256"] = artifact.combine_hashes(hashes)
    _write(staging, manifest)


def heading(plan: Plan) -> dict[str, Any]:
    """The part of the manifest that depends only on the plan. It is enough to load the folder."""
    return {
        "format_version": artifact.VERSION,
        "kind": plan.kind,
        "format": plan.format,
        "source": {
            "model": plan.source.name,
            "model_type": plan.model_type,
            "task": plan.task.name,
            "revision": plan.source.revision,
        },
        "recipe": plan.recipe.to_dict(),
    }


def origin_of(folder: Path, manifest: Mapping[str, Any] | None) -> dict[str, str | None]:
    """The full-precision model that a folder was made from, for the manifest of what is made of the folder.

    `original` is its name without the folder that it lies in, `base` its id on the Hub; None if they are not known.
    """
    source = {} if manifest is None else manifest.get("source", {})
    name = source.get("original") if "target" in source else source.get("model")
    is_id = name is not None and name.count("/") == 1 and not Path(name).is_absolute()
    base = base_of(folder) or source.get("base") or (name if is_id else None)
    return {
        "original": Path(name).name if name is not None and Path(name).is_absolute() else name or base,
        "base": base,
    }


def write_merged_manifest(
    staging: Staging,
    backbone: Backbone,
    source: Mapping[str, Any],
    format: str,
    grids: Mapping[str, Grid],
    shards: Sequence[Shard],
) -> None:
    """The card and `loftq.json` of a backbone with its adapter merged in.

    `source` says what was merged; `grids` are the types of linears that stay quantized.
    """
    shared = next(iter(grids.values()), None)
    manifest = {
        "kind": "merged",
        "format": format,
        "versions": {"loftq": version("loftq"), "torch": version("torch")},
        "source": source,
        "recipe": {
            "compute_dtype": str(backbone.dtype).removeprefix("torch."),
            "block_size": None,
            "group_size": shared.block_size if shared else None,
            "zero_point": shared.zero_point if shared else None,
            "double_quant": shared.double_quant if shared else False,
        },
        "layers": [
            {"name": module, "shape": list(backbone.shapes[module]), "codebook": grid.codebook}
            for module, grid in grids.items()
        ],
    }
    _write_with_card(staging, manifest, backbone.folder, shards)


def write_export_manifest(
    staging: Staging, folder: Path, source: Mapping[str, Any], kind: str, backbone_hash: str = ""
) -> None:
    """The card and `loftq.json` of what is no folder of a model: an adapter alone, or a file of another format.

    It was made from the model in `folder`, whose card names the licence.
    """
    manifest = {"kind": kind, "source": source, "recipe": {}, "layers": []}
    _write_with_card(staging, manifest, folder, (), backbone_hash)


def _write_with_card(
    staging: Staging, manifest: Mapping[str, Any], folder: Path, shards: Sequence[Shard], backbone_hash: str = ""
) -> None:
    staging.write_text(artifact.CARD, merged_card_text({**manifest, "files": dict.fromkeys(staging.hashes)}, folder))
    files, zero_blocks = staging.describe()
    hashes = {shard.file: files[shard.file]["sha256"] for shard in shards}
    more = {"format_version": artifact.VERSION, "files": files, "zero_blocks": zero_blocks}
    _write(
        staging, {**manifest, **more, "backbone_sha256": artifact.combine_hashes(hashes) if shards else backbone_hash}
    )


def _write(staging: Staging, manifest: Mapping[str, Any]) -> None:
    staging.write_text(artifact.MANIFEST, json_text(manifest, indent=1, sort_keys=True) + "\n")


def _config_text(plan: Plan) -> str:
    """The `config.json` of the source with the class of the model, its labels, the dtype, and the quantization."""
    recipe = plan.recipe
    config = read_config(plan.source.folder, tensors=len(plan.source.checkpoint.tensors))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = recipe.compute_dtype
    config["architectures"] = [type(plan.model).__name__]
    if recipe.num_labels is not None:
        labels: Any = plan.model.config
        config |= {"id2label": labels.id2label, "label2id": labels.label2id}
        if "problem_type" in config:  # a head of another size has none
            config["problem_type"] = labels.problem_type
    entry = plan.layout.quantization_config(
        recipe.grids[0],
        recipe.dtype,
        plan.skip_modules,
        plan.codebooks,
        plan.quantized_names,
        plan.target_parameters,
    )
    alone = {"needs_adapter": True} if recipe.needs_adapter and not plan.layout.STOCK else {}
    config["quantization_config"] = {**entry, **alone}
    return config_text(config)
