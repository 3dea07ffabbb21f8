"""`loftq merge`: a backbone and a trained adapter become one model, shard by shard."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from loftq.artifacts.backbone import Backbone, open_backbone
from loftq.artifacts.pair import BackboneAndAdapter
from loftq.artifacts.staging import Staging, check_output, open_staging
from loftq.errors import ArtifactError, OptionError, UnknownNameError
from loftq.formats import artifact, mlx
from loftq.formats.adapter import open_adapter
from loftq.formats.checkpoint import INDEX, Shard, ShardWriter, TensorSpec, index_text, lay_out, parse_size
from loftq.hub.source import side_files
from loftq.merging.exports import fingerprint, kept_tensors, write_gguf, write_plain_lora
from loftq.merging.logits import logit_difference
from loftq.merging.report import MergeReport, loss_text
from loftq.merging.targets import Dense, Integers, Mlx, Rounded, Target
from loftq.models.adapters import fitting_adapter, other_backbone
from loftq.models.tasks import TASKS

TARGETS = {
    "int": "QA-LoRA in the zero-points, exactly: the same codes, in our own format",
    "gptq": "QA-LoRA in whole zero-points, which lose most of it (--allow-rounding)",
    "mlx": "QA-LoRA in the biases of MLX's affine layout, exactly: for mlx-lm",
    "gguf-q4_1": "QA-LoRA of 4 bits in the minima of one GGUF file, to their 16 bits: for llama.cpp",
    "bf16": "a dense model: any adapter, any backbone",
    "lora": "a QA-LoRA adapter as a plain LoRA, for any LoRA server",
}
_TOLERANCE = {"int": 1e-3, "bf16": 0.1}  # of the logits' norm; 16-bit weights and LLM.int8's activations round
_HEAD_TOLERANCE = 0.02  # a head is trained in float32, and stored in the model's 16 bits
_KNOWN = {"use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False}


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
    if resume and overwrite:
        raise OptionError("--resume and --overwrite exclude each other: finish the run, or start again")
    out = Path(output)
    check_output(out, resume=resume, overwrite=overwrite)
    pair, notes = _open_pair(Path(folder), adapter, to)
    if to == "lora":
        return write_plain_lora(pair, out, overwrite, notes, started)
    if to == "gguf-q4_1":
        return write_gguf(pair, out, overwrite, notes, started, quiet)
    target, lost = _target(pair, to, allow_rounding)
    kept = kept_tensors(pair)
    metadata = mlx.METADATA if to == "mlx" else {}
    shards = _lay_out(pair.backbone, target, kept, parse_size(max_shard_size), metadata)
    with open_staging(out, fingerprint(pair, to), overwrite=overwrite) as staging:
        difference = None
        if not staging.ready:
            _write(pair, target, kept, shards, staging, quiet)
            _finish(pair, target, shards, staging, to)
            if check and to != "mlx":  # which mlx alone runs
                difference = logit_difference(pair, staging.folder)
                _refuse_difference(difference, _limit(pair, to), staging)
        nbytes = sum(shard.nbytes for shard in shards)
        staging.publish()
    layers, seconds = len(pair.adapter.modules), time.perf_counter() - started
    return MergeReport(out, to, nbytes, layers, difference, lost, notes, seconds)


def _open_pair(folder: Path, adapter: str | Path | None, to: str) -> tuple[BackboneAndAdapter, tuple[str, ...]]:
    backbone = open_backbone(folder)
    ours = backbone.artifact
    if adapter is None:
        if ours is None or not ours.adapter.is_dir():
            raise OptionError(f"{folder} brings no adapter: name a trained one with --adapter")
        adapter = ours.adapter
    chosen = Path(adapter)
    notes: tuple[str, ...] = ()
    if ours is None:
        found = open_adapter(chosen)
        unknown = sorted(set(found.modules) - set(backbone.grids))
        if unknown:
            raise ArtifactError(f"the adapter {chosen} adapts {unknown[0]!r}, which is no quantized linear of {folder}")
    else:
        found = fitting_adapter(ours, chosen)
        other = other_backbone(ours, found)
        if other is not None:
            text = (
                f"{chosen} was trained on {other}, another backbone than {folder}: it repairs errors that are not here"
            )
            if to != "bf16":
                raise ArtifactError(f"{text}; merge it with --to {to} into its own")
            notes = (text,)
    for key, plain in _KNOWN.items():
        if found.config.get(key) not in (plain, None):
            raise OptionError(
                f"{chosen} has {key} {found.config[key]!r}, which is not merged here: use peft's own merge"
            )
    return BackboneAndAdapter(backbone, found), notes


def _target(pair: BackboneAndAdapter, to: str, allow_rounding: bool) -> tuple[Target, float | None]:
    if to == "bf16":
        return Dense(pair), None
    pair.require_pools()
    if to == "int":
        return Integers(pair), None
    if to == "mlx":
        found = Mlx(pair)
        found.check()
        return found, None
    rounded = Rounded(pair)
    rounded.check()
    lost = rounded.measure()
    if not allow_rounding:
        raise OptionError(
            f"--to gptq has whole zero-points, which cannot hold {pair.adapter.folder}: measured on it, this would "
            f"lose {loss_text(lost)}. Use --to int, which holds it exactly, or add --allow-rounding"
        )
    return rounded, lost


def _lay_out(
    backbone: Backbone, target: Target, kept: Mapping[str, TensorSpec], limit: int, metadata: Mapping[str, str]
) -> list[Shard]:
    groups = []
    seen: set[str] = set()
    for name in [*backbone.checkpoint.tensors, *(name for name in kept if name not in backbone.checkpoint.tensors)]:
        module = backbone.owners.get(name)
        if module is None:
            groups.append([kept[name]])
        elif module not in seen:
            seen.add(module)
            groups.append(target.specs(module))
    return lay_out(groups, limit, metadata=metadata)


def _write(
    pair: BackboneAndAdapter,
    target: Target,
    kept: Mapping[str, TensorSpec],
    shards: list[Shard],
    staging: Staging,
    quiet: bool,
) -> None:
    """All tensors, those that are in place already aside, with a progress bar on stderr."""
    names = [*pair.backbone.grids, *kept]
    left = [name for name in names if name not in staging.done]
    bar = tqdm(left, initial=len(names) - len(left), total=len(names), disable=quiet, dynamic_ncols=True)
    with ShardWriter(staging.folder, shards) as writer:
        for name in bar:
            found = {name: pair.kept(name).to(kept[name].dtype)} if name in kept else target.tensors(name)
            for key, tensor in found.items():
                writer.write(key, tensor)
            staging.note(name, {})


def _finish(pair: BackboneAndAdapter, target: Target, shards: list[Shard], staging: Staging, to: str) -> None:
    """Configuration, tokenizer, card, and the manifest, which hashes all the others."""
    backbone = pair.backbone
    for path in side_files(backbone.folder):
        shutil.copyfile(path, staging.folder / path.name)
    staging.write_text("config.json", json.dumps(target.config(), indent=2, sort_keys=True) + "\n")
    if len(shards) > 1:
        staging.write_text(INDEX, index_text(shards))
    staging.write_text("README.md", _card(pair, to))
    files = artifact.describe_files(staging.folder, [name for name in staging.files() if name != artifact.MANIFEST])
    grids = {module: grid for module in backbone.grids if (grid := target.grid(module)) is not None}
    shared = next(iter(grids.values()), None)
    manifest = {
        "format_version": artifact.VERSION,
        "kind": "merged",
        "format": target.format,
        "versions": {"loftq": version("loftq"), "torch": version("torch")},
        "source": {"model": backbone.folder.name, "task": backbone.task, "target": to},
        "recipe": {
            "compute_dtype": str(backbone.dtype).removeprefix("torch."),
            "block_size": None,
            "group_size": shared.block_size if shared else None,
            "zero_point": shared.zero_point if shared else None,
            "double_quant": shared.double_quant if shared else False,
        },
        "backbone_sha256": artifact.combine_hashes({shard.file: files[shard.file]["sha256"] for shard in shards}),
        "layers": [
            {"name": module, "shape": list(backbone.shapes[module]), "codebook": grid.codebook}
            for module, grid in grids.items()
        ],
        "files": files,
    }
    staging.write_text(artifact.MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _card(pair: BackboneAndAdapter, to: str) -> str:
    loading = {
        "int": "import loftq  # teaches transformers this folder's format\n",
        "gptq": "import loftq  # not needed where gptqmodel and optimum are installed\n",
    }.get(to, "")
    name = TASKS[pair.backbone.task].auto_class
    lines = f"{loading}from transformers import {name}\n\nmodel = {name}.from_pretrained("
    if to == "mlx":
        lines = "from mlx_lm import load\n\nmodel, tokenizer = load("
    return f"""---
tags:
- loftq
---

# {pair.backbone.folder.name}, merged

A quantized backbone and its trained {pair.adapter.kind} adapter in one model, by `loftq merge --to {to}`.

```python
{lines}"...")  # this folder or repository
```
"""


def _limit(pair: BackboneAndAdapter, to: str) -> float | None:
    """How far logits may move, of their norm; None where they are known to."""
    limit = _TOLERANCE.get(to)
    return limit if limit is None or not pair.adapter.saved else max(limit, _HEAD_TOLERANCE)


def _refuse_difference(difference: float | None, limit: float | None, staging: Staging) -> None:
    if difference is not None and limit is not None and not difference <= limit:
        shutil.rmtree(staging.folder)
        if not any(staging.output.iterdir()):
            staging.output.rmdir()
        raise ArtifactError(
            f"the merged model answers otherwise than the adapter on its backbone: its logits differ by "
            f"{difference:.2g} of their norm (at most {limit:g} was expected). Nothing was written"
        )
