"""Training under FSDP 2, which splits the model over the processes: what is refused, and the whole adapter to save."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer

from loftq.errors import OptionError
from loftq.formats.artifact import Artifact
from loftq.training.model import Model

_log = logging.getLogger(__name__)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def check_launcher(backbone: Model) -> None:
    """Raise OptionError for configurations of `accelerate launch` under which the adapter cannot be trained.

    A line says when the codes of a backbone stay whole on each device.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise OptionError(
            "the configuration of accelerate uses DeepSpeed, which `loftq train` does not support: use torchrun, or "
            "FSDP 2 (`loftq config MODEL_DIR --for accelerate-fsdp`)"
        )
    if not _is_set("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise OptionError(
            f"the configuration of accelerate has fsdp_version {version}, which cannot split packed codes: expected "
            "fsdp_version 2 (`loftq config MODEL_DIR --for accelerate-fsdp`)"
        )
    if isinstance(backbone, Artifact) and backbone.manifest["format"] == "bitsandbytes":
        _log.info(
            "the codes of this backbone are bytes of bitsandbytes, which FSDP leaves whole on each device: "
            "`loftq config MODEL_DIR --for accelerate-fsdp` tells how to have them split"
        )


def whole_adapter(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The tensors that train, whole, in main memory, if they are split over the processes; otherwise None.

    All processes must call this together.
    """
    model: Any = trainer.model
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    if not any(isinstance(tensor, DTensor) for tensor in trained.values()):
        return None
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
        for name, tensor in trained.items()
    }
