"""The card of a merged model: what it was made from, its licence, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from loftq.artifacts.backbone import Backbone
from loftq.artifacts.card_metadata import base_of, terms_of
from loftq.display import code, markdown


def merged_card_text(backbone: Backbone, kind: str, target: str, lines: str) -> str:
    """README.md after a merge. `kind` is that of the adapter, `target` the value of --to; `lines` load the result."""
    name = backbone.folder.name
    source = _source(backbone)
    base = base_of(backbone.folder) or (source if source is not None and source.count("/") == 1 else None)
    made = f", which was quantized from {code(source)}" if source is not None else ""
    data: Mapping[str, Any] = {} if base is None else {"base_model": base, "base_model_relation": "finetune"}
    metadata = ModelCardData(tags=["loftq"], **data, **terms_of(backbone.folder)).to_yaml()
    return f"""---
{metadata}
---

# {markdown(name)}, merged

A quantized backbone ({code(name)}{made}) and its trained {markdown(kind)} adapter, merged into one model by
`loftq merge --to {target}`.

```python
{lines}  # this folder or repository
```
"""


def _source(backbone: Backbone) -> str | None:
    """The model that a backbone was made from, without the folder that it lies in; None if it is not recorded."""
    if backbone.artifact is None:
        return None
    name = str(backbone.artifact.manifest["source"]["model"])
    return Path(name).name if Path(name).is_absolute() else name
