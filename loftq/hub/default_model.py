"""The zoo's default model, which a package ships."""

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
    """The zoo's default model: its Hub id and the package that ships it."""
    text = resources.files("loftq.model_zoo").joinpath("default.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def unpack_gguf(file: Path, folder: Path) -> None:
    """Convert a GGUF file into a bfloat16 checkpoint folder, once."""
    if importlib.util.find_spec("gguf") is None:
        raise SourceError(f"reading {file.name} needs the gguf package: pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with scratch_beside(folder) as scratch:
        if (folder / "config.json").is_file():  # by the run that this one has waited for
            return
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        del model.hf_quantizer, model.config.quantization_config  # with them save_pretrained refuses
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(scratch)
        move_into_place(scratch, folder)
