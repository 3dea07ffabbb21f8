"""A callback for trainers that cast what they train to bfloat16.

The trainers of trl cast all trainable parameters of a model on bitsandbytes' weights to bfloat16 when they are made.
QLoRA's B is zero and hardly suffers. The factors of LoftQ are not small: bfloat16 keeps 8 bits of a number, so a step
of less than about a five-hundredth of an entry is rounded away, and at the usual learning rates most entries never
move. Optimizers are created after the trainer and refer to the parameters themselves, so it is enough to give each
parameter its float32 values back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from loftq.errors import OptionError


class KeepFloat32(TrainerCallback):
    """Keep the trainable float32 parameters of `model` in float32, with exactly the values that they have now.

    Make it before the trainer, with the model that the trainer gets, one for each trainer:
    `SFTTrainer(model, callbacks=[loftq.KeepFloat32(model)])`. Raises OptionError for anything else, which would have
    no effect.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"KeepFloat32({model!r}): expected the model itself, such as loftq.load_qlora(...) returns: give the "
                "same model to the trainer"
            )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._kept = [(parameter, parameter.data) for parameter in trained if parameter.dtype == torch.float32]
        if not self._kept:
            why = "trains nothing: load it with is_trainable=True"
            if trained:
                why = f"trains in {str(trained[0].dtype).removeprefix('torch.')}: make the callback before the trainer"
            raise OptionError(f"KeepFloat32: no parameter is float32, the model {why}")

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Restore, before the model is wrapped and an optimizer is created."""
        if not self._kept:
            raise OptionError("this KeepFloat32 was used by another trainer already: make one for each trainer")
        self._restore(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Restore, if the callback was added to a trainer that existed already."""
        if self._kept:
            self._restore(kwargs["model"])

    def _restore(self, model: nn.Module) -> None:
        kept, self._kept = self._kept, []  # DeepSpeed and FSDP free the values that they copy
        theirs = {id(parameter) for parameter in model.parameters()}
        if not any(id(parameter) in theirs for parameter, _ in kept):
            raise OptionError("KeepFloat32 was made with another model than the trainer's: give both the same model")
        for parameter, values in kept:
            parameter.data = values.to(parameter.device)
