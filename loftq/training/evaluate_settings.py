"""The settings of `loftq evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from loftq.settings import again, check, setting
from loftq.training.settings import TrainSettings
from loftq.training.tasks import MEASURES


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """The settings of `loftq evaluate`. Raises OptionError for a value that no evaluation can have."""

    adapter: str | None = setting(
        None, "Folder or id on the Hub of a trained adapter.", "model", metavar="DIR|REPO_ID", usual="that of DIR"
    )
    source: str | None = setting(
        None,
        "Full-precision model for --compare.",
        "model",
        metavar="MODEL",
        usual="the model that the folder was made from",
    )
    task: str = setting("perplexity", "Task to measure; see below.", "data", choices=MEASURES)
    data: tuple[str, ...] = again(TrainSettings, "data", ())
    columns: Mapping[str, str] = again(TrainSettings, "columns", dict)
    chat_template: bool | None = again(TrainSettings, "chat_template", usual="if the model has one")
    cutoff_len: int = again(TrainSettings, "cutoff_len", 1024)
    max_examples: int | None = setting(
        None, "Number of examples (rows); only the first ones are used. A .txt file is one row.", "data", least=1
    )
    compare: bool = setting(
        False, "Also measure full precision, plain quantization and the initial adapter of the folder.", "evaluation"
    )
    window: int | None = setting(
        None,
        "Number of tokens in a window of perplexity.",
        "evaluation",
        least=2,
        usual="1024, or the longest input of the model",
    )
    max_windows: int | None = setting(
        None, "Number of windows of perplexity; only the first ones are measured.", "evaluation", least=1
    )
    stride: int | None = setting(
        None, "Number of tokens between the beginnings of two windows.", "evaluation", least=1, usual="--window"
    )
    max_new_tokens: int | None = setting(
        None, "Largest number of tokens in an answer.", "evaluation", least=1, usual="gsm8k 256, summarization 128"
    )
    batch_size: int = setting(8, "Number of examples that are measured at a time.", "evaluation", least=1)
    card: bool = setting(False, "Write the table into the model card of the folder.", "output")
    dtype: str | None = again(TrainSettings, "dtype")
    cpu: bool | None = again(TrainSettings, "cpu")
    offload: str | None = again(TrainSettings, "offload")
    quiet: bool = setting(True, "Show no progress bar.", "run")

    def __post_init__(self) -> None:
        check(self)


class EvaluateKeywords(TypedDict, total=False):
    """The keywords of `loftq.evaluate`, for editors and type checkers."""

    adapter: str | Path | None
    source: str | Path | None
    task: str
    data: str | Path | Sequence[str]
    columns: Mapping[str, str]
    chat_template: bool | None
    cutoff_len: int
    max_examples: int | None
    compare: bool
    window: int | None
    max_windows: int | None
    stride: int | None
    max_new_tokens: int | None
    batch_size: int
    card: bool
    dtype: str | None
    cpu: bool | None
    offload: str | None
    quiet: bool
