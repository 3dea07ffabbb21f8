"""The default model of the zoo, which a Python package ships as a GGUF file."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from loftq.errors import SourceError
from loftq.formats.disk import move_into_place, scratch_beside


def default_model() -> Mapping[str, Any]:
    """Return the Hub id of the zoo's default model (`model`) and the package that ships it (`package`)."""
    text = resources.files("loftq.model_zoo").joinpath("default.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def unpack_gguf(file: Path, folder: Path) -> None:
    """Convert a GGUF file into a bfloat16 checkpoint folder. An existing checkpoint stays as it is.

    Raises SourceError if the gguf package is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise SourceError(f"reading {file.name} needs the gguf package: pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with scratch_beside(folder) as scratch:
        if (folder / "config.json").is_file():  # another run wrote it while this one waited for the lock
            return
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        del model.hf_quantizer, model.config.quantization_config  # save_pretrained refuses a model that has them
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(scratch)
        move_into_place(scratch, folder)
