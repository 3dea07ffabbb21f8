"""Callbacks of transformers' Trainer: permissions of files, and progress on stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from loftq.formats.disk import follow_umask


class Permissions(TrainerCallback):
    """Lets the permissions of checkpoints follow the umask."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Correct the permissions of the weights that were saved now."""
        if state.is_world_process_zero:
            follow_umask(Path(args.output_dir))


class Progress(ProgressCallback):
    """Shows a progress bar on stderr, and a line whenever figures are logged."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Write the figures that were logged now."""
        shown = {name: logs[name] for name in ("loss", "learning_rate") if name in logs} | scores_of(logs, "eval_")
        if state.is_world_process_zero and self.training_bar is not None and shown:
            line = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}: {line}", file=sys.stderr)


def scores_of(logs: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The figures of an evaluation, without its times."""
    figures = {name.removeprefix("eval_"): float(value) for name, value in logs.items() if name.startswith("eval_")}
    return {f"{prefix}{name}": value for name, value in figures.items() if not name.endswith(("runtime", "second"))}
