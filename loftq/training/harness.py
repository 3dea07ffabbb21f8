"""Runs EleutherAI's lm-eval on a model with its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.chatter import silenced_with_data
from loftq.display import one_line
from loftq.errors import OptionError
from loftq.models.devices import compute_dtype, device_to_run
from loftq.models.tokenizers import check_ids, embedding_rows
from loftq.models.trained_folder import with_backbone
from loftq.training.ends import all_ends, turn_end
from loftq.training.model import find_model
from loftq.training.open_model import open_to_use
from loftq.training.process import explain_memory


@dataclass(frozen=True)
class Harness:
    """The results of lm-eval, in its own form."""

    results: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"harness": self.results["results"]}

    def table(self) -> str:
        """Return the table that lm-eval prints."""
        from lm_eval.utils import make_table

        return str(make_table(self.results)).rstrip()


def run_harness(
    model: str,
    names: Sequence[str],
    *,
    adapter: str | None = None,
    include: str | Path | None = None,
    max_examples: int | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    cpu: bool | None = None,
    quiet: bool = False,
) -> Harness:
    """Run tasks of lm-eval, or tasks that the folder `include` defines. Raises OptionError for an unknown task."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptionError("--harness needs the lm-eval package: pip install 'loftq[harness]'") from error
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise OptionError(f"--harness {unknown[0]}: lm-eval has no such task: name one that `lm-eval ls tasks` lists")
    device = device_to_run(cpu)
    model, adapter = with_backbone(model, adapter)
    with silenced_with_data(quiet), explain_memory():
        opened = open_to_use(find_model(model), adapter, device, compute_dtype(dtype, device))
        backend = "seq2seq" if opened.task.name == "seq2seq-lm" else "causal"
        wrapped = _checked(HFLM)(opened.model, backend=backend, tokenizer=opened.tokenizer, batch_size=batch_size)
        try:
            results = simple_evaluate(model=wrapped, tasks=list(names), task_manager=manager, limit=max_examples)
        except OSError as error:  # from the network or from files
            reason = one_line(error, 300)
            raise OptionError(
                f"--harness {', '.join(names)}: the data cannot be read ({reason}): lm-eval downloads it from the "
                "Hub, check the connection"
            ) from error
    return Harness(results)


def _checked(model_class: Any) -> Any:
    """A class of lm-eval's models that refuses tokens without embeddings and ends answers where chat templates do."""

    class Checked(model_class):  # type: ignore[misc]
        """A model whose tokens are checked."""

        def tok_encode(self, *arguments: Any, **options: Any) -> Any:
            ids = super().tok_encode(*arguments, **options)
            check_ids(ids, embedding_rows(self.model), self.tokenizer)
            return ids

        def tok_batch_encode(self, *arguments: Any, **options: Any) -> Any:
            ids, mask = super().tok_batch_encode(*arguments, **options)
            check_ids((int(ids.max()),), embedding_rows(self.model), self.tokenizer)
            return ids, mask

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            ends = turn_end(self.tokenizer)
            tokens = all_ends(self.model, self.tokenizer, ends)
            return super()._model_generate(
                context, max_length, stop=[*stop, *ends.texts], **{"eos_token_id": tokens, **options}
            )

    return Checked
