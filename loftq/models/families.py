"""Model families: what a `model_type` is known to need. A row is a line; a type without one goes the generic way.

The generic way takes every plain linear of the model that transformers builds from the config, but the
output head, and is right wherever transformers' own bitsandbytes loading is. A row says that this was tested.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One row: the task whose class is built, and whether the tests cover the type."""

    model_type: str
    task_type: str = "CAUSAL_LM"  # peft's name
    tested: bool = True


FAMILIES = {name: Family(name) for name in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi")}


def family_of(model_type: str) -> Family:
    """The row of a model type, or a generic one."""
    return FAMILIES.get(model_type, Family(model_type, tested=False))
