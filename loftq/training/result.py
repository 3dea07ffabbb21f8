"""The result of a training, and the commands that come next."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq.models.tasks import CAUSAL
from loftq.training.tasks.task import CLASSIFIER


@dataclass(frozen=True)
class Result:
    """The result of a training. Losses are the model's own: for text, the mean of all tokens, in nats.

    The loss of the evaluation is the mean over batches, as transformers computes it; if answers differ in length, it
    depends on the batch size. `next_steps` are commands that use the folder.
    """

    folder: Path
    trainable: int
    total: int
    steps: int
    examples: int
    train_loss: float
    evaluation: dict[str, float]
    seconds: float
    next_steps: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "folder": str(self.folder), "next_steps": list(self.next_steps)}

    def table(self) -> str:
        """Return the figures as text for a person, and the commands that come next."""
        lines = [
            f"{self.steps} steps, {self.examples} examples, {self.seconds:.0f} s",
            f"train loss {self.train_loss:.4f}",
        ]
        lines += [f"held-out {name} {value:.4f}" for name, value in self.evaluation.items()]
        lines.append(f"adapter in {self.folder}")
        if self.next_steps:
            lines += ["", "Next:", *(f"  {command}" for command in self.next_steps)]
        return "\n".join(lines)


def next_steps(folder: Path, training_task: str, model_task: str, base: str | None) -> tuple[str, ...]:
    """Commands that use a trained folder. `base` is the full-precision model of a plain LoRA, which is not merged."""
    name = shlex.quote(str(folder))
    merged = shlex.quote(f"{folder}-merged")
    measure = f" --task {training_task}" if training_task in ("gsm8k", "classification", "summarization") else ""
    steps = [f"loftq evaluate {name}{measure} --data FILE"]
    if model_task in CAUSAL:
        steps.insert(0, f"loftq chat {name}")
    elif model_task != CLASSIFIER:
        steps.insert(0, f'loftq generate {name} --prompt "..."')
    if base is None:
        steps.append(f"loftq merge {name} --to bf16 --output {merged}")
        steps += [f"vllm serve {merged}"] if model_task in CAUSAL else []
    elif model_task in CAUSAL:
        steps.append(f"vllm serve {shlex.quote(base)} --enable-lora --lora-modules trained={name}")
    return tuple(steps)
