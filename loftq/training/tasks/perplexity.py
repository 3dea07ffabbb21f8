"""Perplexity: exp of the mean loss of a token, over windows of a single long text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loftq.errors import OptionError
from loftq.hub.columns import find_columns, text_of
from loftq.training.opened import Opened
from loftq.training.tasks import language_modelling
from loftq.training.tasks.task import Measure, MeasureSettings, encoder_of

if TYPE_CHECKING:
    import numpy as np

_WINDOW = 1024  # tokens; less if the model's longest input is shorter


def perplexity(
    model: Any,
    ids: Sequence[int] | np.ndarray,
    window: int,
    stride: int,
    *,
    most: int | None = None,
    quiet: bool = False,
) -> dict[str, float]:
    """Measure perplexity over windows of `window` tokens that begin `stride` tokens apart.

    Each token is scored once: in the first window that holds it and a token before it, given all tokens before it in
    that window. If the stride equals the window, which is fastest, the first token of each window is not scored. A
    smaller stride gives each token more context. With `most`, only so many windows are measured, the first ones. The
    result includes these numbers, because the perplexity depends on them. Raises OptionError for a text with fewer than
    two tokens.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    if len(ids) < 2:
        raise OptionError("the text has fewer than two tokens, so there is nothing to score: use a longer text")
    total, scored, windows = 0.0, 0, 0
    starts = range(0, max(len(ids) - window, 0) + stride, stride)[:most]
    scored_to = 1  # the first token has nothing before it
    with torch.no_grad():
        for start in tqdm(starts, disable=quiet, desc="perplexity", unit="window", dynamic_ncols=True):
            end = min(start + window, len(ids))
            if end <= scored_to:
                break
            tokens = torch.tensor(np.array(ids[start:end], dtype=np.int64), device=model.device)[None]
            first = max(scored_to, start + 1)  # the first token of a window has no context
            logits = model(input_ids=tokens).logits[0, first - start - 1 : -1].float()
            total += float(torch.nn.functional.cross_entropy(logits, tokens[0, first - start :], reduction="sum"))
            scored += end - first
            windows += 1
            scored_to = end
    mean = torch.tensor(total / scored, dtype=torch.float64)  # its exponential may be infinite
    figures = {"tokens": scored, "windows": windows, "window": window, "stride": stride}
    return {"perplexity": float(mean.exp()), **figures}


def measure(opened: Opened, rows: Any, settings: MeasureSettings) -> dict[str, float]:
    from tqdm import tqdm

    column = find_columns(rows, language_modelling.TEXT, settings.columns)["text"]
    encoder = encoder_of(settings, opened)
    window = min(settings.window or _WINDOW, opened.longest)
    stride, most = min(settings.stride or window, window), settings.max_windows
    enough = None if most is None else window + (most - 1) * stride
    texts = [text_of(row, column) for row in rows]
    with tqdm(
        total=sum(map(len, texts)), disable=settings.quiet, desc="tokenize", unit="char", unit_scale=True, leave=False
    ) as bar:
        ids = language_modelling.joined_ids(texts, encoder, enough=enough, progress=bar.update)
    return perplexity(opened.model, ids, window, stride, most=most, quiet=settings.quiet)


MEASURES = {
    "perplexity": Measure(
        "a causal model on text, in windows of --window tokens that begin --stride tokens apart",
        "clm",
        measure,
        ("window", "stride", "max_windows"),
        joins_rows=True,
    )
}
