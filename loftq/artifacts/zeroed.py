"""Finds weights that were lost as blocks of zeros, without the source and even where the hashes match.

A disk that loses power, and a file system that runs full, leave whole blocks of zeros. `loftq.json` records how many
such blocks the tensors had when they were written. A folder of an older loftq has no such record. There, the norm of a
layer shows whether its blocks are lost: backbone and adapter together differ from the weight by its reported error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loftq.artifacts.backbone import Backbone
from loftq.artifacts.checks import Problem
from loftq.artifacts.pair import BackboneAndAdapter
from loftq.core.metric import squared
from loftq.formats.artifact import MANIFEST
from loftq.formats.scan import BLOCK
from loftq.models.layout_linears import read_weight

_TOLERANCE = 1e-3  # relative to the norm of a weight


def new_zeros(zero_blocks: Mapping[str, int], manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """Compare the blocks of zeros of the tensors in files with those that were written."""
    recorded = manifest.get("zero_blocks")
    if not isinstance(recorded, Mapping):
        return
    for name, count in zero_blocks.items():
        before = recorded.get(name, 0)
        if not isinstance(before, int) or count > before:
            yield Problem(name, f"has {count} blocks of {BLOCK} zero bytes, {MANIFEST} has {before}: its data is lost")


def implausible_zeros(
    zero_blocks: Mapping[str, int], backbone: Backbone, pair: BackboneAndAdapter | None, manifest: Mapping[str, Any]
) -> Iterator[Problem]:
    """Check the tensors with blocks of zeros in a folder whose manifest does not say which had them before."""
    if isinstance(manifest.get("zero_blocks"), Mapping):
        return
    rows = {row["name"]: row for row in manifest["layers"]}
    stored = backbone.checkpoint.tensors
    for module in dict.fromkeys(backbone.owners[name] for name in zero_blocks if name in backbone.owners):
        yield from _compare_norm(module, backbone, pair, rows[module])
    for name, count in zero_blocks.items():
        is_matrix = name in stored and name not in backbone.owners and len(stored[name].shape) > 1
        if is_matrix and count >= -(-stored[name].nbytes // BLOCK):
            yield Problem(name, "holds only zeros")


def _compare_norm(
    module: str, backbone: Backbone, pair: BackboneAndAdapter | None, row: Mapping[str, Any]
) -> Iterator[Problem]:
    """By the triangle inequality, the norm of the result differs from that of the weight by at most the error."""
    if "weight_norm" not in row or "error" not in row:
        return
    weight = read_weight(
        backbone.format, module, backbone.shapes[module], backbone.grids[module], backbone.checkpoint.read
    )
    added = None if pair is None else pair.delta(module)
    norm = squared(weight if added is None else weight + added) ** 0.5
    unit = row["weight_norm"] or 1.0
    if not abs(norm - row["weight_norm"]) <= unit * (row["error"] + _TOLERANCE):  # written so that NaN differs
        text = f"has norm {norm:.6g}, but {MANIFEST} has {row['weight_norm']:.6g} with the relative error "
        yield Problem(module, f"{text}{row['error']:.6g}: its data is lost")
