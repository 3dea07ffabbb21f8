"""A Trainer that needs less memory: no logits of a whole batch (`models.head_loss`), fewer activations on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer

from loftq.models.cheap_activations import keeping_less
from loftq.models.head_loss import HiddenStates, next_token_loss
from loftq.training.callbacks import scores_of


class LeanTrainer(Trainer):
    """transformers' Trainer, with the same loss to rounding. Only tokens that are learned get logits, a few at a time.

    A model whose loss is more than the cross-entropy of its head's outputs takes the usual way, and so does an
    evaluation that scores logits.
    """

    _states: HiddenStates | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean loss of the tokens that are learned, in nats; with the outputs without logits if they are asked."""
        loss = self._streamed(model, inputs, num_items_in_batch)
        if loss is None:
            with self._keeping(model):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _keeping(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The context in which a model that learns runs."""
        recorded = model.training and not self.args.torch_compile
        return keeping_less(self.args.device) if recorded else nullcontext()

    def _streamed(
        self, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None
    ) -> torch.Tensor | None:
        """The loss by the short way; None if the model needs the usual one."""
        inner: Any = self.accelerator.unwrap_model(model)
        config = inner.config
        adds_losses = getattr(config.get_text_config(), "output_router_logits", False)
        if config.is_encoder_decoder or adds_losses or "labels" not in inputs or self.compute_metrics is not None:
            return None
        if self._states is None:
            self._states = HiddenStates(inner)
        states = self._states
        others = {name: value for name, value in inputs.items() if name != "labels"}
        with self._keeping(model):
            output = states.of(lambda: model(**others))
        if output is None:
            return None
        smoothing = float(self.args.label_smoothing_factor)
        head = cast(nn.Module, states.head)
        total, count = next_token_loss(output.logits, head, inputs["labels"], smoothing=smoothing)
        if num_items is None or not self.model_accepts_loss_kwargs:
            return total / max(count, 1)
        loss = total / num_items
        if self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size() if self.args.n_gpu <= 1 else 1)
        return loss


def last_loss(trainer: Trainer, mean: float) -> float:
    """The loss that was logged last, or the mean of the run if none was logged."""
    return float([mean, *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)][-1])


def last_scores(trainer: Trainer) -> dict[str, float]:
    """The evaluation after the last step: the logged one if there is one, otherwise a new one."""
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1:]
    is_current = last and last[0]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end
    return scores_of(last[0] if is_current else trainer.evaluate())
