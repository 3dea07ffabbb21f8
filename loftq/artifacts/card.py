"""The model card of an artifact: a description, how to load it, its settings, and what was measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from loftq.artifacts.card_metadata import metadata
from loftq.artifacts.card_section import marked
from loftq.artifacts.loading_snippet import loading_section
from loftq.core.codebooks import labels
from loftq.core.grid import ROW
from loftq.core.solvers.methods import METHODS, PLAIN_START
from loftq.display import code, code_block, markdown, markdown_table, size
from loftq.hub.text import public_name
from loftq.planning.command_line import command_line
from loftq.planning.plan import Plan
from loftq.planning.recipe import Recipe

_WORST = 5
_OUTPUTS = {
    "output error, rounding alone": "output_plain_error",
    "output error, with the adapter": "output_error",
    "divergence from full precision on held-out text, in nats per token": "divergence_before",
    "divergence after refining": "divergence",
}
_INTRODUCTIONS = {
    "lora": """A quantized backbone with a LoRA adapter that corrects its rounding error. loftq made both from {label}
({how}). As a start for fine-tuning they are closer to the full-precision model than rounding alone.""",
    "qalora": """A backbone of integers in groups with a QA-LoRA adapter on pooled inputs (arXiv 2309.14717). loftq made
both from {label}. A trained adapter can be merged into the zero-points without loss:
`loftq merge MODEL_DIR --adapter TRAINED --to int`.""",
}


def card_text(
    plan: Plan, heading: Mapping[str, Any], totals: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> str:
    """The text of README.md, with metadata for the Hub. It holds no date, time or path: the same run, the same card.

    `heading` is the part of the manifest that comes from the plan alone.
    """
    recipe, label = plan.recipe, plan.source.label
    notes = "".join(f"\n- {markdown(note)}" for note in plan.notes)
    return f"""---
{metadata(plan)}
---

# {markdown(label)}, {recipe.bits} bits, rank {recipe.rank}

{_INTRODUCTIONS[recipe.adapter].format(label=code(label), how=_how(recipe))}

## Load

{marked(loading_section(heading))}

- The adapter belongs to this backbone, and so does every adapter that is trained from it. On another backbone, or on
  the original weights, it would correct errors that are not there.
{plan.layout.card_note(recipe.grids[0])}{_head(plan)}{notes}

## Settings

{markdown_table(_settings(plan))}

With loftq {version("loftq")}, this command makes the folder again, with the same bytes on the same kind of machine.
`loftq.json` lists all versions and hashes.

{code_block(command_line(recipe, plan.source))}

## Measured

Weight errors are Frobenius norms over all quantized weights, divided by the norm of the
weights.{_output_errors(plan)}

{markdown_table(_measured(totals))}

The layers with the largest error:

{_worst_layers(rows)}
"""


def _head(plan: Plan) -> str:
    if not plan.modules_to_save:
        return ""
    names = ", ".join(code(name) for name in plan.modules_to_save)
    return (
        f"\n- The head ({names}) is a part of the adapter, which trains and saves it. transformers warns that the head "
        "is newly initialized; peft then loads it."
    )


def _settings(plan: Plan) -> dict[str, str]:
    recipe = plan.recipe
    names = labels(plan.codebooks.values())
    counts = Counter(names[codebook] for codebook in plan.codebooks.values())
    kinds = "".join(counts) if len(counts) == 1 else ", ".join(f"{n} x {name}" for name, n in sorted(counts.items()))
    grid = recipe.grids[0]
    what = "groups" if grid.zero_point else "blocks"
    rounding = f"{kinds}, " + ("one scale per row" if grid.block_size == ROW else f"{what} of {grid.block_size}")
    rounding += f", {grid.zero_point} zero-points" if grid.zero_point else ""
    left = [name for name in plan.skip_modules if not any(name.startswith(saved) for saved in plan.modules_to_save)]
    rounds = f"{recipe.iters} iteration{'s' if recipe.iters > 1 else ''}"
    method = f"{METHODS[recipe.method].title}, {rounds}"
    if recipe.method == PLAIN_START:
        method = "QLoRA's start (B = 0)"
    if recipe.adapter == "qalora":
        method = f"QA-LoRA, pools of {recipe.pool_size}, scales and zero-points fitted in up to {rounds}"
    text = {}
    if recipe.calibration is not None:
        windows = f"{recipe.calibration_tokens} tokens of {public_name(recipe.calibration)}"
        text = {"calibration": f"{windows}, in windows of up to {recipe.sequence_length}"}
    return {
        "task": plan.task.name,
        "method": method,
        **text,
        "rounding": rounding + (", double quantization" if recipe.double_quant else ""),
        "rank, alpha": f"{recipe.rank}, {recipe.alpha:g}" + (" (rank-stabilized)" if recipe.rslora else ""),
        "adapted modules": ", ".join(_collapsed(plan.target_modules)),
        f"in {recipe.compute_dtype}": ", ".join(["embeddings", "norms", *_collapsed(left)]),
        "seed": str(recipe.seed),
    }


def _collapsed(names: Sequence[str]) -> list[str]:
    """Names in which the number of a layer is replaced by *, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _measured(totals: Mapping[str, Any]) -> dict[str, str]:
    return {
        "bits per weight of the linears": f"{totals['bits_per_weight']:.3f}",
        "backbone": f"{size(totals['source_bytes'])} -> {size(totals['backbone_bytes'])}",
        "adapter": size(totals["adapter_bytes"]),
        "weight error, rounding alone": f"{totals['plain_error']:.5f}",
        **({"weight error, before the adapter": f"{totals['refit_error']:.5f}"} if "refit_error" in totals else {}),
        "weight error, with the adapter": f"{totals['error']:.5f}",
        **{name: f"{totals[key]:.5f}" for name, key in _OUTPUTS.items() if key in totals},
    }


def _worst_layers(rows: Sequence[Mapping[str, Any]]) -> str:
    worst = sorted(rows, key=lambda row: -row["error"])[:_WORST]
    lines = [f"| {markdown(row['name'])} | {row['plain_error']:.5f} | {row['error']:.5f} |" for row in worst]
    return "\n".join(["| layer | rounding alone | with the adapter |", "| --- | --- | --- |", *lines])


def _how(recipe: Recipe) -> str:
    method = METHODS[recipe.method]
    published = method.source.startswith("arXiv")
    return (
        f"{method.title}, {method.source}" if published else f"{method.title}, which minimizes the {method.minimizes}"
    )


def _output_errors(plan: Plan) -> str:
    if plan.recipe.calibration is None:
        return ""
    return "\nOutput errors are root mean squares over the layers, on the calibration text."
