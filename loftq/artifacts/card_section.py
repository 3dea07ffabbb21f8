"""The section of a card about loading, which must name the repository instead of the folder after a push.

HTML comments around the section mark its place, so that its wording may change and a user may edit the text around it.
Older cards have no such marks: there the section is recognized by the lines of its code. If a user has edited those
lines, the section stays unchanged.
"""

from __future__ import annotations

import re
from pathlib import Path

from loftq.display import one_line
from loftq.errors import ArtifactError

_BEGIN, _END = "<!-- loftq:load -->", "<!-- /loftq:load -->"
_MARKED = re.compile(f"{_BEGIN}.*?{_END}", re.DOTALL)
_UNMARKED = re.compile(
    r"""```python
(?:import loftq  # [^\n]*
)?import torch
from peft import PeftModel
from transformers import [\w, ]+

MODEL_DIR = "[^"\n]*"(?:  # this folder or repository)?

base_model = \w+\.from_pretrained\([^`#]*\)
model = PeftModel\.from_pretrained\(base_model, MODEL_DIR, [^\n`#]*\)
```

or, with loftq installed, `model = loftq\.load_\w+\([^`\n]*\)`\."""
)


def read_card(path: Path) -> str:
    """The text of a card. Raises ArtifactError if it cannot be read as text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read ({one_line(error, 120)}): save it as UTF-8 text") from error


def marked(section: str) -> str:
    """The section about loading, between the marks by which `replace_marked` finds it."""
    return f"{_BEGIN}\n{section}\n{_END}"


def replace_marked(card: str, section: str) -> str:
    """A card with a new section about loading. A card without such a section stays unchanged."""
    pattern = _MARKED if _MARKED.search(card) else _UNMARKED
    return pattern.sub(lambda _: marked(section), card, count=1)
