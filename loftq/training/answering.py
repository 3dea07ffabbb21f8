"""Answers of a model to prompts in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loftq.errors import OptionError
from loftq.training.ends import Ends, all_ends
from loftq.training.opened import Opened


def answers(
    opened: Opened,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 8,
    ends: Ends = Ends(),  # noqa: B008
    quiet: bool = False,
    desc: str = "generate",
) -> list[str]:
    """Return the greedy answers to prompts, which are token ids, in their order; each answer ends before `ends`.

    If the longest prompt leaves less than `max_new_tokens` of the model's positions, all answers have this lower limit,
    so that an answer does not depend on the batch that it is in.
    """
    from tqdm import tqdm

    for number, ids in enumerate(prompts, 1):
        if not ids:
            raise OptionError(f"row {number}: the prompt has no tokens: remove the row, or give it a text")
    room = room_for(opened, prompts, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))  # prompts of similar lengths need less padding
    texts_by_place: dict[int, str] = {}
    with tqdm(total=len(prompts), disable=quiet, desc=desc, unit="prompt", dynamic_ncols=True) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts = write_answers(opened, [prompts[at] for at in chosen], room, ends)
            texts_by_place |= dict(zip(chosen, texts, strict=True))
            bar.update(len(chosen))
    return [texts_by_place[at] for at in range(len(prompts))]


def room_for(opened: Opened, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """The number of tokens, at most `max_new_tokens`, for which the model has positions after the longest prompt.

    The decoder of an encoder-decoder has its own positions, and its start token takes the first one.
    """
    taken = 1 if opened.task.name == "seq2seq-lm" else max(map(len, prompts))
    return min(max_new_tokens, opened.longest - taken)


def write_answers(
    opened: Opened,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Ends,
    *,
    streamer: Any = None,
    beside: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> list[str]:
    """Return the answers to a batch of prompts, of at most `max_new_tokens` each, without their ends.

    `beside` are other inputs of the model, such as those of images.
    """
    import torch
    from transformers import GenerationConfig

    tokenizer, model = opened.tokenizer, opened.model
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    # Padding is on the left, because the answer follows on the right.
    rows = [[pad] * (longest - len(ids)) + list(ids) for ids in prompts]
    masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    settings = GenerationConfig.from_model_config(model.config)
    texts = list(ends.texts)
    settings.update(  # type: ignore[no-untyped-call]
        **{"do_sample": False, **sampling},
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=all_ends(model, tokenizer, ends),
        stop_strings=texts or None,
    )
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(masks, device=model.device),
            generation_config=settings,
            streamer=streamer,
            **(beside or {}),
            **({"tokenizer": tokenizer} if texts else {}),
        )
    new = output if opened.task.name == "seq2seq-lm" else output[:, longest:]
    return [ends.cut(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
