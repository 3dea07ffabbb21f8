"""The part of a card about loading. Oracle: cards as loftq 0.1.0 wrote them, and all that lies around the part."""

from __future__ import annotations

from pathlib import Path

import pytest

from loftq.artifacts.card_section import marked, replace_marked

OLD = sorted((Path(__file__).parent / "old_cards").glob("*.md"))
SECTION = r"other words, with \1 and \g<0>"


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_an_older_card_has_its_part_replaced(path: Path) -> None:
    card = path.read_text()
    before, after = card[: card.index("```python")], card[card.index("\n\n- The adapter belongs") :]
    found = replace_marked(card, SECTION)
    assert found == f"{before}{marked(SECTION)}{after}"
    assert replace_marked(found, "again") == f"{before}{marked('again')}{after}"  # the marks alone tell the place


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("ours", "edited"),
    [
        ("\nbase_model = ", "\n# Our words.\nbase_model = "),
        ("import torch\n", "import os\nimport torch\n"),
        ("or, with loftq installed, ", "or "),
    ],
)
def test_an_edited_part_without_marks_stays(ours: str, edited: str, path: Path) -> None:
    card = path.read_text()
    assert card.count(ours) >= 1
    card = card.replace(ours, edited)
    assert replace_marked(card, SECTION) == card


def test_a_marked_part_is_replaced_whatever_it_says() -> None:
    card = f"# Mine\n\n{marked('anything')}\n\n```python\nMODEL_DIR = 1\n```\n"
    assert replace_marked(card, "this") == card.replace("anything", "this")
