"""The lines that load an artifact: in its card, and, with the repository's id, as what `loftq push` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq.formats.adapter import FOLDER
from loftq.models.tasks import TASKS

_IMPORTS = {
    "loftq": "import loftq  # teaches transformers this folder's format; without it the folder is refused\n",
    "gptq": "import loftq  # not needed where gptqmodel and optimum are installed\n",
}


def loading_lines(
    made: Mapping[str, Any], repo_id: str | None = None, revision: str | None = None, trained: str | None = None
) -> str:
    """Python that loads the backbone and its initial adapter, or the one in the subfolder `trained`.

    `made` is a manifest, or the heading of one. Without the id of a repository the place is left open.
    """
    recipe, loader = made["recipe"], TASKS[made["source"]["task"]].auto_class
    place = '"..."  # this folder or repository' if repo_id is None else f'"{repo_id}"'
    at = [] if revision is None else [f'revision="{revision}"']
    dtype = f"torch_dtype=torch.{recipe['compute_dtype']}"
    quantized = made["format"] == "bitsandbytes"
    names = f"{loader}, BitsAndBytesConfig" if quantized else loader
    arguments = ["MODEL_DIR", *at, dtype]
    base = ", ".join(arguments)
    if quantized:
        arguments.append(f"quantization_config=BitsAndBytesConfig({_options(recipe)})")
        base = "".join(f"\n    {argument}," for argument in arguments) + "\n"
    ends = [f'subfolder="{trained or FOLDER}"', *at, *([] if trained else ["is_trainable=True"])]
    return f"""{_IMPORTS.get(made["format"], "")}import torch
from peft import PeftModel
from transformers import {names}

MODEL_DIR = {place}

base_model = {loader}.from_pretrained({base})
model = PeftModel.from_pretrained(base_model, MODEL_DIR, {", ".join(ends)})
"""


def loading_section(made: Mapping[str, Any], repo_id: str | None = None, revision: str | None = None) -> str:
    """What a card says of loading: the lines, and the one that does with loftq."""
    folder = "MODEL_DIR"
    if repo_id is not None:
        at = "" if revision is None else f', revision="{revision}"'
        folder = f"huggingface_hub.snapshot_download(MODEL_DIR{at})"
    return f"""```python
{loading_lines(made, repo_id, revision)}```

or, with loftq installed, `model = loftq.load_{made["kind"]}({folder})`."""


def _options(recipe: Mapping[str, Any]) -> str:
    if recipe["bits"] == 8:
        return "load_in_8bit=True"
    return f"""
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.{recipe["compute_dtype"]},
        bnb_4bit_use_double_quant={recipe["double_quant"]},
        bnb_4bit_quant_type="{recipe["quant_type"]}{recipe["bits"]}",
    """
