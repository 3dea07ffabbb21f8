"""A small model of any type that transformers can build, what its forward takes, and what comes out."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from conftest import save_model
from small_configs import END, small_config
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loftq.models.families import family_of
from loftq.models.tasks import TASKS, auto_class

ROWS, LENGTH = 16, 12  # texts, and tokens of each
GAINS = {"t5": 1, "mt5": 1, "umt5": 1, "longt5": 1}  # which are initialized large enough
SECONDS = 4000  # samples of a sound


def small_model(kind: str, task: str, **changes: Any) -> PreTrainedModel:
    """The model of a type for a task, with reproducible weights that are large enough to matter."""
    torch.manual_seed(0)
    if task.endswith("-classification"):
        changes = {"num_labels": 8, **changes}
    config = small_config(kind, **changes)
    config.architectures = [architecture_of(config, task)]
    model: PreTrainedModel = auto_class(TASKS[task]).from_config(config)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            module.weight.data *= GAINS.get(kind, 3)  # as initialized, they hardly show in the output
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()) or (parameter.ndim == 3 and "expert" in name):
            parameter.data = torch.randn(parameter.shape) * 0.1  # some types leave memory as they find it
    return model.to(dtype_of(kind)).eval()


def architecture_of(config: PretrainedConfig, task: str) -> str:
    """The name of the class for a task, the first where there are several."""
    found = auto_class(TASKS[task])._model_mapping[type(config)]
    return str((found[0] if isinstance(found, (list, tuple)) else found).__name__)


def dtype_of(kind: str) -> torch.dtype:
    """In which transformers can run a type."""
    return torch.float32 if family_of(kind).float32 else torch.bfloat16


def save_small(kind: str, task: str, folder: Path, **changes: Any) -> Path:
    """Save it as a checkpoint."""
    return save_model(small_model(kind, task, **changes), folder)


def inputs_of(model: Any, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """What the forward of such a model takes: tokens, an image, or a sound."""
    generator = torch.Generator().manual_seed(0)
    takes, config, dtype = inspect.signature(model.forward).parameters, model.config, model.dtype
    vocabulary = min(getattr(config.get_text_config(), "vocab_size", None) or 300, 300)
    ids = torch.randint(6, vocabulary - 10, (rows, LENGTH), generator=generator)
    ids[:, -1] = END
    inputs: dict[str, torch.Tensor] = {}
    if model.main_input_name == "pixel_values":
        size, channels = _found(config, "image_size", 224), _found(config, "num_channels", 3)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs["pixel_values"] = torch.randn(rows, channels, height, width, generator=generator).to(dtype)
    elif model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions if hasattr(config, "max_source_positions") else 64
        bins = _found(config, "num_mel_bins", None) or _found(config, "feature_projection_input_dim", 80)
        first = (bins, frames) if "conv1" in dict(_encoder(model).named_children()) else (frames, bins)
        inputs["input_features"] = torch.randn(rows, *first, generator=generator).to(dtype)
    elif model.main_input_name == "input_values":
        inputs["input_values"] = torch.randn(rows, SECONDS, generator=generator).to(dtype)
    else:
        inputs["input_ids"] = ids
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones_like(ids)
        if "global_attention_mask" in takes:
            inputs["global_attention_mask"] = (torch.arange(LENGTH) == 0).long().expand(rows, -1)  # the first token
        if config.model_type == "gemma3":
            inputs["token_type_ids"] = torch.zeros_like(ids)  # text alone
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def output_of(model: Any, base: Any = None) -> torch.Tensor:
    """Logits, or the last hidden state, in float32."""
    found = model(**inputs_of(base if base is not None else model))
    for key in ("logits", "start_logits", "prediction_logits", "last_hidden_state"):
        if found.get(key) is not None:
            return found[key].float()
    return next(value for value in found.values() if isinstance(value, torch.Tensor)).float()


def _found(config: Any, name: str, default: Any) -> Any:
    """An entry of a config or of its parts."""
    parts = [config, *(getattr(config, key) for key in getattr(config, "sub_configs", {}))]
    return next((getattr(part, name) for part in parts if getattr(part, name, None) is not None), default)


def _encoder(model: Any) -> Any:
    return model.get_encoder() if hasattr(model, "get_encoder") else model
