"""Merges that are no folder of a model: an adapter alone, and a file of GGUF."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from loftq.artifacts.pair import BackboneAndAdapter
from loftq.artifacts.staging import Staging, open_staging
from loftq.core import pooled
from loftq.core.affine import AffineWeight
from loftq.errors import OptionError
from loftq.formats import adapter as adapters
from loftq.formats import artifact, gguf_q4_1
from loftq.formats.checkpoint import ShardWriter, TensorSpec, lay_out
from loftq.merging.report import MergeReport


def kept_tensors(pair: BackboneAndAdapter) -> dict[str, TensorSpec]:
    """The tensors beside quantized weights, by name; a head that the adapter trained takes the backbone's place."""
    backbone = pair.backbone
    found = {name: spec for name, spec in backbone.checkpoint.tensors.items() if name not in backbone.owners}
    for name, key in pair.adapter.saved.items():
        found[name] = TensorSpec(name, backbone.dtype, pair.adapter.shapes[key])
    return found


def fingerprint(pair: BackboneAndAdapter, to: str) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    weights = pair.adapter.folder / adapters.WEIGHTS
    state = weights.stat()
    backbone = pair.backbone
    return {
        "target": to,
        "backbone": backbone.artifact.backbone_hash if backbone.artifact else str(backbone.folder.resolve()),
        "adapter": [str(weights.resolve()), state.st_size, state.st_mtime_ns],
        "version": version("loftq"),
    }


def write_plain_lora(
    pair: BackboneAndAdapter, out: Path, overwrite: bool, notes: tuple[str, ...], started: float
) -> MergeReport:
    """The adapter alone: each column of A once for every input of its pool."""
    found, pool = pair.adapter, pair.adapter.pool_size
    if pool is None:
        raise OptionError(f"{found.folder} is a plain LoRA already: any LoRA server takes it as it is")
    config = {key: value for key, value in found.config.items() if key not in ("use_qalora", "qalora_group_size")}
    ends = {name: name.rpartition(".lora_A.")[1] for name in found.shapes}
    specs = [
        TensorSpec(name, torch.float32, (shape[0], shape[1] * pool) if ends[name] else shape)
        for name, shape in found.shapes.items()
    ]
    shards = lay_out([specs], sum(spec.nbytes for spec in specs) + 1, adapters.WEIGHTS)
    with open_staging(out, fingerprint(pair, "lora"), overwrite=overwrite) as staging:
        with ShardWriter(staging.folder, shards) as writer:
            for name in found.shapes:
                tensor = found.read(name).float()
                writer.write(name, pooled.plain_lora(tensor, pool) if ends[name] else tensor)
        staging.write_text(adapters.CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        _finish(pair, staging, "adapter")
    nbytes, seconds = shards[0].nbytes, time.perf_counter() - started
    return MergeReport(out, "lora", nbytes, len(found.modules), None, None, notes, seconds)


def write_gguf(
    pair: BackboneAndAdapter, out: Path, overwrite: bool, notes: tuple[str, ...], started: float, quiet: bool
) -> MergeReport:
    """One file that llama.cpp runs, with the tokenizer in it."""
    backbone = pair.backbone
    pair.require_pools()
    for bits, block in backbone.kinds:
        gguf_q4_1.check(backbone.config, bits, block)
    kept = kept_tensors(pair)
    bar = tqdm(total=len(kept) + len(backbone.grids), disable=quiet, dynamic_ncols=True)

    def linear(module: str) -> AffineWeight:
        bar.update()
        return pair.affine(module)

    def dense(name: str) -> torch.Tensor:
        bar.update()
        return pair.kept(name).to(kept[name].dtype)

    with bar, open_staging(out, fingerprint(pair, "gguf-q4_1"), overwrite=overwrite) as staging:
        path = staging.folder / f"{backbone.folder.name}-q4_1.gguf"
        gguf_q4_1.write(path, backbone.config, backbone.folder, backbone.shapes, kept, linear, dense)
        nbytes = path.stat().st_size
        _finish(pair, staging, "gguf")
    layers, seconds = len(pair.adapter.modules), time.perf_counter() - started
    return MergeReport(out, "gguf-q4_1", nbytes, layers, None, None, notes, seconds)


def _finish(pair: BackboneAndAdapter, staging: Staging, kind: str) -> None:
    """Write the manifest of what has been made, and move all into place."""
    manifest = {
        "format_version": artifact.VERSION,
        "kind": kind,
        "recipe": {},
        "backbone_sha256": pair.backbone.artifact.backbone_hash if pair.backbone.artifact else "",
        "layers": [],
        "files": artifact.describe_files(staging.folder, staging.files()),
    }
    staging.write_text(artifact.MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    staging.publish()
