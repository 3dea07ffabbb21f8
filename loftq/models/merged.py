"""Loads a folder that `loftq merge` wrote, to generate from it or to measure it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from loftq.errors import ArtifactError, OptionError
from loftq.formats import compressed_tensors
from loftq.formats.artifact import MANIFEST, Artifact
from loftq.models.loading import guard_cpu
from loftq.models.refusals import explain_loading
from loftq.models.tasks import TASKS, Task, auto_class, recorded_task
from loftq.models.tokenizers import gguf_file

MERGED, GGUF = "merged", "gguf"  # kinds of `loftq.json`
WITH_ADAPTER = ("qlora", "qalora")  # the kinds of folders that `loftq quantize` writes
_ELSEWHERE = {  # formats and kinds that transformers does not read, and the program that does
    "mlx": "MLX's own layout: use `mlx_lm.generate --model {folder}`, or merge with --to bf16",
    "adapter": "an adapter that peft does not read: use it with the server that it was written for, or merge with "
    "--to lora",
}


def load_merged(artifact: Artifact, device_map: Any, dtype: torch.dtype) -> tuple[Any, Task]:
    """Return the model of a merged folder, with dense weights where transformers cannot run the packed ones.

    Raises ArtifactError for a folder in a layout that transformers does not read, and OptionError where a package that
    it needs is not installed.
    """
    folder, manifest = artifact.folder, artifact.manifest
    kind, format = manifest["kind"], str(manifest.get("format"))
    reader = _ELSEWHERE.get(format, _ELSEWHERE.get(kind))
    if reader is not None:
        raise ArtifactError(f"{folder} is written for another program, {reader.format(folder=folder)}")
    if kind == GGUF:
        return _load_gguf(folder, device_map, dtype), TASKS["causal-lm"]
    options: dict[str, Any] = {}
    if format == compressed_tensors.METHOD:
        options["quantization_config"] = _dense_config(folder)
    task = recorded_task(manifest, folder / MANIFEST)
    with explain_loading(folder), warnings.catch_warnings():  # about options that are added to those of the folder
        warnings.simplefilter("ignore", UserWarning)
        model = auto_class(task).from_pretrained(folder, dtype=dtype, device_map=device_map, **options)
    guard_cpu(model)
    return model, task


def _dense_config(folder: Path) -> Any:
    """The option that makes transformers load dense weights: version 5 cannot keep zero-points compressed."""
    from transformers import CompressedTensorsConfig

    try:
        import compressed_tensors  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"{folder} needs the compressed-tensors package: pip install 'loftq[compressed-tensors]'"
        ) from error
    return CompressedTensorsConfig(dequantize=True)


def _load_gguf(folder: Path, device_map: Any, dtype: torch.dtype) -> Any:
    """The model of a GGUF file with dense weights."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise OptionError(f"{folder} needs the gguf package: pip install 'loftq[gguf]'") from error
    name = gguf_file(folder)
    if name is None:
        raise ArtifactError(f"{folder} has no .gguf file: merge it again")
    with explain_loading(folder):
        return auto_class(TASKS["causal-lm"]).from_pretrained(
            folder, gguf_file=name, dtype=dtype, device_map=device_map
        )
