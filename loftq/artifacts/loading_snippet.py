"""The Python lines that load an artifact, for its card and, with the id of a repository, for `loftq push`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq.artifacts.serving import serving_section
from loftq.core.solvers.methods import PLAIN_START
from loftq.formats.adapter import FOLDER
from loftq.formats.layouts import LAYOUTS
from loftq.models.tasks import recorded_task

_ALONE = """**Always load the adapter too.** `from_pretrained(MODEL_DIR)`, `pipeline(model=MODEL_DIR)` and trainers that
get nothing but `MODEL_DIR` read the backbone without the adapter that corrects it, and say nothing. Without it the
backbone {harm}.

"""
_HARM = "is often worse than plain rounding"
_USELESS = """is of no use: it leaves out what the adapter adds. A new LoRA on the backbone does not have what is
missing. Only this adapter, and those that are trained from it, do"""
_IN_ONE_CALL = f"""

In transformers, `adapter_kwargs={{"subfolder": "{FOLDER}"}}` in `from_pretrained(MODEL_DIR, ...)` reads both in one
call; a `pipeline` takes it within `model_kwargs={{...}}`."""


def loading_lines(
    manifest: Mapping[str, Any], repo_id: str | None = None, revision: str | None = None, trained: str | None = None
) -> str:
    """Lines that load the backbone with its initial adapter, or with the adapter in the subfolder `trained`.

    `manifest` is a manifest or the heading of one. Without the id of a repository the place is left open.
    """
    recipe, loader = manifest["recipe"], recorded_task(manifest).auto_class
    place = '"..."  # this folder or repository' if repo_id is None else f'"{repo_id}"'
    at = [] if revision is None else [f'revision="{revision}"']
    dtype = f"torch_dtype=torch.{recipe['compute_dtype']}"
    layout = LAYOUTS[manifest["format"]]
    options = layout.load_options(recipe)
    names = ", ".join([loader, *([options.partition("(")[0]] if options else [])])
    arguments = ["MODEL_DIR", *at, dtype]
    base = ", ".join(arguments)
    if options:
        arguments.append(f"quantization_config={options}")
        base = "".join(f"\n    {argument}," for argument in arguments) + "\n"
    ends = [f'subfolder="{trained or FOLDER}"', *at, *([] if trained else ["is_trainable=True"])]
    return f"""{layout.IMPORT_LINE}import torch
from peft import PeftModel
from transformers import {names}

MODEL_DIR = {place}

base_model = {loader}.from_pretrained({base})
model = PeftModel.from_pretrained(base_model, MODEL_DIR, {", ".join(ends)})
"""


def loading_section(manifest: Mapping[str, Any], repo_id: str | None = None, revision: str | None = None) -> str:
    """The part of a card about loading: the lines for stock libraries, the one for loftq, and those for servers."""
    folder = "MODEL_DIR"
    if repo_id is not None:
        at = "" if revision is None else f', revision="{revision}"'
        folder = f"huggingface_hub.snapshot_download(MODEL_DIR{at})"
    serving = serving_section(manifest, repo_id, revision)
    more = f"\n\n{serving}" if serving else ""
    corrects = manifest["kind"] == "qlora" and manifest["recipe"].get("method") != PLAIN_START
    useless = manifest["recipe"].get("rounding") == "projected"
    alone = _ALONE.format(harm=_USELESS if useless else _HARM) if corrects else ""
    return f"""{alone}```python
{loading_lines(manifest, repo_id, revision)}```

or, with loftq installed, `model = loftq.load_{manifest["kind"]}({folder})`.{_IN_ONE_CALL}{more}"""
