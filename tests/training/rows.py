"""Small data for training: sums, as prompts and answers, questions, labelled texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int = 40) -> list[dict[str, str]]:
    """Prompts and their answers."""
    return [{"prompt": f"What is {i}+{i}?", "response": f"It is {2 * i}."} for i in range(count)]


def problems(count: int = 8) -> list[dict[str, str]]:
    """As GSM8K has them."""
    return [{"question": f"What is {i}+1?", "answer": f"{i}+1 = {i + 1}.\n#### {i + 1}"} for i in range(count)]


def reviews(count: int = 40) -> list[dict[str, Any]]:
    """Texts of two sorts."""
    return [{"text": "good film" if i % 2 else "bad plot", "label": i % 2} for i in range(count)]


def articles(count: int = 24) -> list[dict[str, str]]:
    """Documents and their summaries."""
    return [{"document": f"The {i} cats sat on the mat all day.", "summary": f"{i} cats sat."} for i in range(count)]
