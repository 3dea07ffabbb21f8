"""The card and `loftq.json` of an adapter for a backbone that another program quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from loftq.artifacts.card_metadata import terms_of
from loftq.artifacts.card_section import marked
from loftq.artifacts.manifest import VERSIONS
from loftq.artifacts.rows import summed_errors
from loftq.artifacts.staging import Staging
from loftq.core.solvers.methods import METHODS
from loftq.display import code, code_block, markdown, markdown_table, size
from loftq.formats import artifact
from loftq.formats.adapter import CONFIG, FOLDER, config_text
from loftq.formats.schema import json_text
from loftq.hub.text import public_name
from loftq.planning.command_line import command_line
from loftq.planning.given_backbone import GivenBackbone, recorded_settings
from loftq.planning.given_gguf import is_gguf
from loftq.planning.plan import Plan

KIND = artifact.START


def write_adapter_config(plan: Plan, staging: Staging, base: str, revision: str | None) -> None:
    """Write the configuration that peft reads, with the backbone as the base model."""
    recipe = plan.recipe
    text = config_text(
        base,
        plan.target_modules,
        rank=recipe.rank,
        alpha=recipe.alpha,
        rslora=recipe.rslora,
        dropout=recipe.dropout,
        task_type=plan.task.peft_type,
        modules_to_save=plan.modules_to_save,
        revision=revision,
    )
    staging.write_text(f"{FOLDER}/{CONFIG}", text)


def totals_of_adapter(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sizes, and with rows the errors, of all layers."""
    sizes = {"layers": len(plan.layers), "weights": plan.weights, "adapter_bytes": plan.adapter.nbytes}
    return {**sizes, **(summed_errors(rows) if rows else {})}


def write_adapter_manifest(
    plan: Plan,
    backbone: GivenBackbone,
    staging: Staging,
    rows: Sequence[Mapping[str, Any]],
    base: str,
    calibration: Mapping[str, Any] | None,
) -> None:
    """Write the card and `loftq.json`. `base` is the name of the backbone in the adapter's configuration."""
    heading: dict[str, Any] = {
        "format_version": artifact.VERSION,
        "kind": KIND,
        "source": {
            "model": plan.source.name,
            "model_type": plan.model_type,
            "task": plan.task.name,
            "revision": plan.source.revision,
            "target": "adapter",
        },
        "backbone": {"model": base, "revision": backbone.revision, "kind": backbone.title},
        "recipe": recorded_settings(plan.recipe),
    }
    totals = totals_of_adapter(plan, rows)
    staging.write_text(artifact.CARD, _card(plan, backbone, heading, totals))
    files, zero_blocks = staging.describe()
    hashes = {name: record["sha256"] for name, record in staging.done.items() if "sha256" in record}
    heading["source"]["sha256"] = artifact.combine_hashes(hashes)
    manifest = {
        **heading,
        "versions": {name: version(name) for name in VERSIONS},
        "backbone_sha256": "",
        "totals": totals,
        "layers": list(rows),
        "notes": list(plan.notes),
        "calibration": calibration,
        "files": files,
        "zero_blocks": zero_blocks,
    }
    staging.write_text(artifact.MANIFEST, json_text(manifest, indent=1, sort_keys=True) + "\n")


def start_section(manifest: Mapping[str, Any], repo_id: str | None = None, revision: str | None = None) -> str:
    """The part of the card with the lines that put the adapter on its backbone."""
    place = '"..."  # this folder or repository' if repo_id is None else f'"{repo_id}"'
    at = "" if revision is None else f', revision="{revision}"'
    base = str(manifest["backbone"]["model"])
    shown = Path(base).name if Path(base).is_absolute() else base
    commit = manifest["backbone"].get("revision")
    of_base = "" if commit is None else f', revision="{commit}"'
    if is_gguf(base):
        place_of_base, _, file = base.rpartition("/")
        shown = Path(place_of_base).name if Path(base).is_absolute() else place_of_base
        of_base = f', gguf_file="{file}"{of_base}'
    return f"""```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

ADAPTER = {place}

base_model = AutoModelForCausalLM.from_pretrained("{shown}"{of_base}, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base_model, ADAPTER, subfolder="{FOLDER}"{at}, is_trainable=True)
```"""


def _card(plan: Plan, backbone: GivenBackbone, heading: Mapping[str, Any], totals: Mapping[str, Any]) -> str:
    """The text of README.md. It holds no date, time or path."""
    recipe, label, given = plan.recipe, plan.source.label, backbone.source
    base: dict[str, Any] = {} if given.local else {"base_model": given.name, "base_model_relation": "adapter"}
    data = ModelCardData(library_name="peft", tags=["loftq", "lora"], **base, **terms_of(plan.source.folder))
    method = METHODS[recipe.method]
    settings = {
        "task": plan.task.name,
        "adapter": f"the best of its rank in closed form, by the {method.minimizes}",
        "rank, alpha": f"{recipe.rank}, {recipe.alpha:g}" + (" (rank-stabilized)" if recipe.rslora else ""),
        "adapted modules": ", ".join(plan.target_modules),
        "adapter size": size(totals["adapter_bytes"]),
    }
    if recipe.calibration is not None:
        settings["calibration"] = f"{recipe.calibration_tokens} tokens of {public_name(recipe.calibration)}"
    for prefix, what in (("", "weights"), ("output_", "outputs")):
        if f"{prefix}error" in totals:
            settings[f"error of {what}, backbone alone"] = f"{totals[f'{prefix}plain_error']:.5f}"
            settings[f"error of {what}, with the adapter"] = f"{totals[f'{prefix}error']:.5f}"
    notes = "".join(f"\n- {markdown(note)}" for note in plan.notes)
    return f"""---
{data.to_yaml()}
---

# {markdown(label)}, adapter of rank {recipe.rank} for {markdown(given.label)}

A LoRA adapter that corrects the rounding error of {code(given.label)} ({markdown(backbone.title)}), a quantization of
{code(label)}. As a start for fine-tuning, both together are closer to the full-precision model than the backbone alone.

## Load

{marked(start_section(heading))}

- The adapter belongs to this backbone. On another one, or on the original weights, it would correct errors that are not
  there.{notes}

## Settings

{markdown_table(settings)}

With loftq {version("loftq")}, this command makes the folder again. `loftq.json` lists all versions and hashes.

{code_block(command_line(recipe, plan.source))}
"""
