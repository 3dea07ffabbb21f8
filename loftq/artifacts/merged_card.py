"""The card of what `loftq merge` wrote: what it was made from, and the lines that load and serve it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from loftq.artifacts.card_metadata import terms_of
from loftq.artifacts.card_section import marked
from loftq.artifacts.serving import PLACE, serving_section
from loftq.display import code, markdown
from loftq.formats import compressed_tensors
from loftq.formats.layouts import LAYOUTS
from loftq.models.tasks import recorded_task

_RELATIONS = {"bf16": "finetune", "lora": "adapter", "mlx-lora": "adapter", "gguf-lora": "adapter"}
_LIBRARIES = {"mlx": "mlx", "mlx-lora": "mlx", "lora": "peft", "gguf": None, "gguf-lora": None, "gguf-q4_1": None}
_WHAT = {
    "lora": "A trained LoRA adapter, written for the full-precision model",
    "mlx-lora": "A trained LoRA adapter, written for mlx-lm",
    "gguf-lora": "A trained LoRA adapter in a GGUF file, written for llama.cpp",
}


def merged_card_text(manifest: Mapping[str, Any], folder: Path) -> str:
    """The text of README.md. `manifest` is that of the result, `folder` has the card that names the licence."""
    source = manifest["source"]
    target = source["target"]
    base = {"base_model": source["base"], "base_model_relation": _RELATIONS.get(target, "quantized")}
    data = ModelCardData(
        library_name=_LIBRARIES.get(target, "transformers"),
        tags=["loftq", target],
        **(base if source.get("base") else {}),
        **terms_of(folder),
    )
    made = f"{_WHAT[target]}." if target in _WHAT else "A quantized backbone and its trained adapter in one model."
    if source.get("adapter") is None:
        made = "A model in another format."
    return f"""---
{data.to_yaml()}
---

# {markdown(source["model"])}, {target}

{made} Written by `loftq merge --to {target}`{_of(source)}.{_lost(source)}

{marked(merged_section(manifest))}
"""


def merged_section(manifest: Mapping[str, Any], repo_id: str | None = None, revision: str | None = None) -> str:
    """The part of the card about loading and serving. Without the id of a repository the place is left open."""
    place = f'"{repo_id or PLACE}"'
    at = f', revision="{revision}"' if repo_id and revision else ""
    lines = _loading(manifest, place, at)
    python = f"```python\n{lines}\n```" if lines else ""
    return "\n\n".join(part for part in (python, serving_section(manifest, repo_id, revision)) if part)


def _loading(manifest: Mapping[str, Any], place: str, at: str) -> str:
    """Lines of Python that load the model; empty where a server is the only reader."""
    if manifest["kind"] != "merged":
        return ""
    if manifest["format"] == "mlx":
        return f"from mlx_lm import load\n\nmodel, tokenizer = load({place}{at})"
    loader, options = recorded_task(manifest).auto_class, ""
    names, first = loader, LAYOUTS[manifest["format"]].IMPORT_LINE if manifest["format"] in LAYOUTS else ""
    if manifest["format"] == compressed_tensors.METHOD:
        names, options = (
            f"{loader}, CompressedTensorsConfig",
            ", quantization_config=CompressedTensorsConfig(dequantize=True)",
        )
    return f"{first}from transformers import {names}\n\nmodel = {loader}.from_pretrained({place}{at}{options})"


def _lost(source: Mapping[str, Any]) -> str:
    """What rounding the merged weights anew has lost."""
    if "rounding_error" not in source:
        return ""
    return (
        f" The weights with their adapter were rounded anew to {source['rounded_to']}, which moved them by "
        f"{source['rounding_error']:.1%} of their norm. That is lost, and no adapter makes up for it: the backbone "
        "with its adapter, and the merge into 16 bits (`--to bf16`), are nearer to what was trained."
    )


def _of(source: Mapping[str, Any]) -> str:
    if source.get("adapter") is None:
        return f" from {code(source['model'])}"
    made = f", which was quantized from {code(source['original'])}" if source.get("original") else ""
    return f" from a {markdown(source['adapter'])} adapter and its backbone {code(source['model'])}{made}"
