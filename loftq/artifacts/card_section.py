"""The part of a card that changes when the folder is pushed: how to load it, which then names the repository.

Marks around the part, which readers of the card do not see, say where it is; its words may change, and a user may
write what he likes around it. Older cards have no marks: there the part is known by its code, line by line, and one
that a user has edited stays as it is.
"""

from __future__ import annotations

import re

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


def marked(section: str) -> str:
    """The part about loading, with the marks by which it is found again."""
    return f"{_BEGIN}\n{section}\n{_END}"


def replace_marked(card: str, section: str) -> str:
    """A card with another part about loading. One without such a part stays as it is."""
    pattern = _MARKED if _MARKED.search(card) else _UNMARKED
    return pattern.sub(lambda _: marked(section), card, count=1)
