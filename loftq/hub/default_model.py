"""The zoo's default model, which a package ships."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from loftq.errors import SourceError


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

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        where = Path(scratch) / folder.name
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        del model.hf_quantizer, model.config.quantization_config  # with them save_pretrained refuses
        model.save_pretrained(where)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(where)
        if not (folder / "config.json").is_file():  # another run may have been faster, and be reading its own
            shutil.rmtree(folder, ignore_errors=True)
            where.rename(folder)
