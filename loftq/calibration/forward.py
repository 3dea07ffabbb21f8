"""What runs the full-precision model over the batches of a calibration: this process, or others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from loftq.calibration.block_weights import BlockWeights
from loftq.calibration.input_files import InputFiles
from loftq.calibration.observer import InputObserver
from loftq.calibration.progress import Progress
from loftq.core.kernels.products import fast_products
from loftq.models.image_text import placed
from loftq.models.lockstep import Batch
from loftq.models.lockstep import run as run_in_lockstep
from loftq.models.refusals import explain_forward
from loftq.planning.plan import Plan

Answers = list[dict[str, torch.Tensor]]


class WorkerLostError(Exception):
    """A process that calibrates has died. What is recorded of the progress remains."""


class Forward(Protocol):
    """Runs a model over batches, in this process or in others."""

    def __call__(
        self, batches: Sequence[Batch], files: InputFiles, progress: Progress, bar: Any
    ) -> tuple[Answers, dict[str, str]]:
        """Write the files. Returns the answers to each batch, and the SHA-256 of each tensor that was read.

        Raises WorkerLostError if a process died: then it is called again.
        """


@dataclass(frozen=True)
class ForwardHere:
    """Runs the model over all batches in this process."""

    plan: Plan
    device: torch.device
    trust_remote_code: bool

    def __call__(
        self, batches: Sequence[Batch], files: InputFiles, progress: Progress, bar: Any
    ) -> tuple[Answers, dict[str, str]]:
        """Write the files. Returns the answers, and the SHA-256 of each tensor that was read."""
        plan = self.plan
        weights = BlockWeights(plan, self.device, trust_remote_code=self.trust_remote_code)
        answers: Answers = [{} for _ in batches]
        inputs = [placed(batch, self.device, weights.dtype) for batch in batches]
        observer = InputObserver(plan, weights, files, bar, answers, progress)
        with fast_products(), observer.recorder.watching(), explain_forward(plan.source.name, plan.model_type):
            run_in_lockstep(weights.core, inputs, weights.blocks, observer, progress)
        observer.save(None)
        return answers, weights.digests
