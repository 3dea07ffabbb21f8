"""The card of a trained adapter: its backbone, its data, its settings, its losses, and the lines that load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from loftq.artifacts.card_metadata import terms_of
from loftq.display import code, code_block, markdown, markdown_table
from loftq.formats.artifact import Artifact
from loftq.formats.layouts import LAYOUTS
from loftq.hub.source import Source
from loftq.hub.text import is_dataset, public_name
from loftq.models.tasks import recorded_task
from loftq.training.model import Model
from loftq.training.open_model import mode_of
from loftq.training.settings import TrainSettings

_ELSEWHERE = ("model", "data", "eval_data", "output", "push_to_hub", "calibration", "report_to")  # paths, or not here


def adapter_card(settings: TrainSettings, backbone: Model, record: Mapping[str, Any]) -> str:
    """The text of README.md, without any path of this machine. `record` is the contents of `training.json`."""
    title = Path(settings.output).resolve().name
    name, origin = _names(backbone)
    made = f", made from {code(origin)}" if origin not in (None, name) else ""
    return f"""---
{_metadata(settings, backbone, origin)}
---

# {markdown(title)}

A LoRA adapter that `loftq train --task {settings.task}` trained on {code(name)}{made}. It belongs to this backbone: on
other weights it would correct errors that are not there.

## Load

```python
{_loading_lines(backbone, name, title)}
```

or `loftq generate {title} --prompt "..."`, with the backbone where it was when the adapter was trained.

## Data

{_data(settings, record)}

## Settings

{markdown_table(_settings(settings, record))}

## Results

{markdown_table(_results(record))}

{_losses(record)}

{code_block(", ".join(f"{package} {number}" for package, number in record["versions"].items()))}
"""


def _names(backbone: Model) -> tuple[str, str | None]:
    """The name of the backbone, and of the full-precision model that it comes from if that is known."""
    if isinstance(backbone, Artifact):
        return backbone.folder.resolve().name, _public(str(backbone.manifest["source"]["model"]))
    if isinstance(backbone, Path):
        return backbone.resolve().name, None
    return (backbone.label if backbone.local else backbone.name), None


def _public(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def _metadata(settings: TrainSettings, backbone: Model, origin: str | None) -> str:
    """The YAML between the card's dashes."""
    folder = backbone if isinstance(backbone, Path) else backbone.folder
    hub_id = backbone.name if isinstance(backbone, Source) and not backbone.local else origin
    data = ModelCardData(
        library_name="peft",
        base_model=hub_id if hub_id is not None and hub_id.count("/") == 1 else None,
        tags=["loftq", "lora", mode_of(settings, backbone)],
        datasets=[name.partition(":")[0].partition("@")[0] for name in settings.data if is_dataset(name)] or None,
        **terms_of(folder),
    )
    return str(data.to_yaml())


def _loading_lines(backbone: Model, name: str, title: str) -> str:
    """Python that loads the backbone and this adapter. Folders are named by their last part."""
    if isinstance(backbone, Artifact):
        layout, loader = LAYOUTS[backbone.manifest["format"]], recorded_task(backbone.manifest).auto_class
        kind = backbone.manifest["kind"]
        return (
            f'import loftq\n\nmodel = loftq.load_{kind}("{name}", "{title}")\n\n# or with stock libraries:\n'
            f"{layout.IMPORT_LINE}from peft import PeftModel\nfrom transformers import {loader}\n\n"
            f'base_model = {loader}.from_pretrained("{name}")\nmodel = PeftModel.from_pretrained(base_model, "{title}")'
        )
    if isinstance(backbone, Path):
        return f'import loftq\n\nmodel = loftq.load_qalora("{name}", "{title}")'
    return f'from peft import AutoPeftModel\n\nmodel = AutoPeftModel.from_pretrained("{title}")  # on {name}'


def _data(settings: TrainSettings, record: Mapping[str, Any]) -> str:
    """The names of the data, and the hash of their rows, which does not depend on files."""
    lines = []
    for option, names in (("data", settings.data), ("eval_data", settings.eval_data)):
        if names:
            purpose = "Trained on" if option == "data" else "Evaluated on"
            digest = f", rows with the SHA-256 `{record['rows'][option]}`" if option in record["rows"] else ""
            lines.append(f"- {purpose} {', '.join(code(public_name(name)) for name in names)}{digest}")
    if not settings.eval_data:
        lines.append("- Evaluated on a twentieth of the rows, which was held out")
    return "\n".join(lines)


def _settings(settings: TrainSettings, record: Mapping[str, Any]) -> dict[str, str]:
    values = {name: value for name, value in settings.to_dict().items() if name not in _ELSEWHERE}
    return {name.replace("_", " "): str(value) for name, value in {**values, **record["split"]}.items()}


def _results(record: Mapping[str, Any]) -> dict[str, str]:
    result = record["result"]
    return {
        "steps": f"{result['steps']:,}",
        "examples": f"{result['examples']:,}",
        "parameters that train": f"{result['trainable']:,} of {result['total']:,}",
        "loss of training, last": f"{result['train_loss']:.4f}",
        **{f"held-out {name}": f"{value:.4f}" for name, value in result["evaluation"].items()},
        "seconds": f"{result['seconds']:.0f}",
    }


def _losses(record: Mapping[str, Any]) -> str:
    """A table of the losses on the way: of training, and of the evaluation at the same step."""
    steps: dict[int, dict[str, float]] = {}
    for entry in record["history"]:
        found = {name: entry[name] for name in ("loss", "eval_loss") if name in entry}
        if found:
            steps.setdefault(entry["step"], {}).update(found)
    evaluated = {step: row for step, row in steps.items() if "eval_loss" in row} or steps
    lines = ["| step | loss of training | held-out loss |", "| --- | --- | --- |"]
    for step, row in evaluated.items():
        cells = [f"{row[name]:.4f}" if name in row else "" for name in ("loss", "eval_loss")]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)
