"""Perplexity: exp of the mean loss a token, over windows of one long text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from loftq.errors import OptionError


def perplexity(model: Any, ids: Sequence[int], window: int, stride: int, *, quiet: bool = False) -> dict[str, float]:
    """Over windows of `window` tokens that begin `stride` tokens apart.

    A token is scored once, by all tokens before it in the first window that holds it and one before it: with a stride
    of the window, which costs least, the first of each window goes unscored; a smaller stride gives each token more to
    go by. Both stand beside the figure, which means little without them. Raises OptionError for a text of one token.
    """
    if len(ids) < 2:
        raise OptionError("the text has fewer than two tokens: nothing to score")
    total, scored, windows = 0.0, 0, 0
    starts = range(0, max(len(ids) - window, 0) + stride, stride)
    done = 1  # the first token has nothing before it
    with torch.no_grad():
        for start in tqdm(starts, disable=quiet, desc="perplexity", unit="window", dynamic_ncols=True):
            end = min(start + window, len(ids))
            if end <= done:
                break
            tokens = torch.tensor([list(ids[start:end])], device=model.device)
            first = max(done, start + 1)  # of a window of its own, the first token goes unscored
            logits = model(input_ids=tokens).logits[0, first - start - 1 : -1].float()
            total += float(nn.functional.cross_entropy(logits, tokens[0, first - start :], reduction="sum"))
            scored += end - first
            windows += 1
            done = end
    mean = torch.tensor(total / scored, dtype=torch.float64)  # whose exponential may be infinite
    figures = {"tokens": scored, "windows": windows, "window": window, "stride": stride}
    return {"perplexity": float(mean.exp()), **figures}
