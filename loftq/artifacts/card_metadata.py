"""The head of a card, which the Hub reads: the base model, the licence, the data sets and the tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from loftq.formats.artifact import CARD
from loftq.hub.source import Source
from loftq.hub.text import is_dataset
from loftq.planning.plan import Plan

_TERMS = ("license", "license_name", "license_link")


def metadata(plan: Plan) -> str:
    """The YAML between a card's dashes."""
    recipe, source = plan.recipe, plan.source
    base: dict[str, Any] = {} if source.local else {"base_model": source.name, "base_model_relation": "quantized"}
    text = recipe.calibration
    data = ModelCardData(
        library_name="transformers",
        tags=["loftq", plan.kind, *([plan.format] if plan.stock else []), f"{recipe.bits:g}-bit"],
        datasets=[text.partition(":")[0]] if text is not None and is_dataset(text) else None,
        **base,
        **_terms(source),
    )
    return str(data.to_yaml())


def terms_of(folder: Path) -> dict[str, Any]:
    """The licence that the card in a folder names; empty if it names none."""
    fields = _fields(folder)
    return {name: fields[name] for name in _TERMS if _is_text(fields.get(name))}


def base_of(folder: Path) -> str | None:
    """The base model that the card in a folder names, an id on the Hub; None if it names none."""
    base = _fields(folder).get("base_model")
    return base if isinstance(base, str) and base.count("/") == 1 else None


def _terms(source: Source) -> dict[str, Any]:
    """The licence of a source, from its own card if it has one."""
    return terms_of(source.folder) or ({"license": source.license} if source.license else {})


def _fields(folder: Path) -> dict[str, Any]:
    try:
        return metadata_load(folder / CARD) or {}
    except Exception:  # a card may hold anything; a damaged one names nothing
        return {}


def _is_text(value: Any) -> bool:
    """Whether a value of another card is a text, or a list of texts. A card may hold structures of any size."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))
