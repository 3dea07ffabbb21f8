"""A pico model of every image-text type: two layers of text, one or two of vision, and inputs with a real image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import save_model
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from vision_configs import IMAGE, PICOS, SIDE

from loftq.models.tasks import TASKS, auto_class

__all__ = ["IMAGE", "PICOS", "SIDE", "TASK"]
ROWS = 8  # of a batch
TASK = "image-text-to-text"


def vision_config(name: str, **changes: Any) -> PretrainedConfig:
    """The config of a type's pico model."""
    return AutoConfig.for_model(name, **{**PICOS[name].config, **changes})


def vision_model(name: str, **changes: Any) -> PreTrainedModel:
    """A type's pico model in bfloat16, with reproducible weights that are large enough to matter."""
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class(TASKS[TASK]).from_config(vision_config(name, **changes))
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # gemma3's projector begins at zero
        elif parameter.ndim > 1:
            parameter.data *= 3
        elif parameter_name.endswith("gate") or "gate_" in parameter_name:
            parameter.data += 0.5  # mllama's layers begin closed
    return model.bfloat16().eval()


def save_vision(name: str, folder: Path, **changes: Any) -> Path:
    """Save it as a checkpoint."""
    return save_model(vision_model(name, **changes), folder)


def vision_inputs(name: str, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """What the forward of such a model takes for texts with an image each."""
    pico = PICOS[name]
    words = torch.randint(6, 290, (rows, 10), generator=torch.Generator().manual_seed(0))
    start = torch.tensor([pico.start] * rows, dtype=torch.int64).view(rows, -1)
    image = torch.full((rows, pico.tokens), IMAGE)
    ids = torch.cat([words[:, :3], start, image, words[:, 3:]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pico.inputs(rows)}
    for kind, value in pico.text.items():
        inputs[kind] = (ids == IMAGE).long() * value
    if name == "mllama":
        inputs["cross_attention_mask"] = torch.ones(rows, ids.shape[1], 1, 1, dtype=torch.int64)
    return inputs
