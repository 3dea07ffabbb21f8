"""Compares the logits of a merged model with those of the adapter on its backbone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from loftq.artifacts.pair import BackboneAndAdapter
from loftq.artifacts.staging import Staging
from loftq.errors import ArtifactError
from loftq.merging.target import Target
from loftq.models.loading import load_base
from loftq.models.peft_targets import load_adapter
from loftq.models.refusals import explain_loading
from loftq.models.tasks import TASKS, auto_class


def checked_difference(target: Target, staging: Staging) -> float | None:
    """The difference of logits. Above the target's tolerance, the output is removed and ArtifactError raised."""
    difference, tolerated = logit_difference(target.pair, staging.folder), target.tolerated
    if difference is not None and tolerated is not None and not difference <= tolerated:
        shutil.rmtree(staging.folder)
        if not any(staging.output.iterdir()):
            staging.output.rmdir()
        raise ArtifactError(
            f"the outputs of the merged model differ from those of the adapter on its backbone: the logits differ by "
            f"{difference:.2g} of their norm (expected at most {tolerated:g}). Nothing was written"
        )
    return difference


def logit_difference(pair: BackboneAndAdapter, merged: Path) -> float | None:
    """The difference of the logits of a few tokens, relative to their norm. None if the model does not read tokens."""

    base = load_base(pair.backbone.artifact or pair.backbone.folder, dtype=torch.float32)
    if base.main_input_name != "input_ids":
        return None
    before = _logits(load_adapter(base, pair.adapter.folder).eval(), base.config)
    del base
    task = TASKS[pair.backbone.task]
    with explain_loading(merged):
        model = auto_class(task).from_pretrained(merged, dtype=torch.float32)
    after = _logits(model.eval(), None)
    return float((after - before).norm() / before.norm())


@torch.no_grad()
def _logits(model: Any, config: Any) -> torch.Tensor:
    config = config or model.config
    tokens = (torch.arange(16) * 37 + 11).remainder(config.get_text_config().vocab_size).unsqueeze(0)
    inputs = {"input_ids": tokens}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(1)
    output = model(**inputs)
    answer: torch.Tensor = next(output[key] for key in ("logits", "start_logits", "last_hidden_state") if key in output)
    return answer.double()
