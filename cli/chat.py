"""`loftq chat`."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import click

from loftq.display import visible
from loftq.settings import from_dict
from loftq.training.chat_session import COMMANDS, Session
from loftq.training.sampling import Sampling
from loftq.training.settings import TrainSettings

from .options import Command, debug, given, option, options_of
from .output import echo, model_stream
from .wrapping import Wrapped

_COMMANDS = "\n".join(f"  {name:<14} {meaning}" for name, meaning in COMMANDS.items())
_EPILOG = f"""\b
In the chat:
{_COMMANDS}

\b
Examples:
  loftq chat MODEL_DIR
  loftq chat MODEL_DIR --adapter trained --system "You answer in one sentence." --temperature 0.7
  loftq chat MODEL_DIR < questions.txt > answers.txt
"""
_SHOWN = ("dtype", "cpu", "offload")


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model", metavar="DIR|REPO_ID", type=click.Path())
@option("--system", group="data", help="System message, for models with a chat template.")
@option(
    "--chat-template/--no-chat-template",
    group="data",
    default=None,
    help="Write messages with the model's chat template.  [default: if the model has one]",
)
@option("--adapter", group="adapter", help="Folder or id on the Hub of a trained adapter.  [default: that of DIR]")
@options_of(Sampling)
@options_of(TrainSettings, only=_SHOWN)
@debug
def chat(model: str, system: str | None, **options: Any) -> None:
    """Talk with a model, in several turns, and see its answers as they come.

    DIR is a folder that `loftq quantize` wrote, or any model. Each line is a message, or one of the commands below. If
    the standard input is no terminal, its lines are answered one after the other. A model without a chat template
    answers each message by itself, because it was not trained on conversations.
    """
    others = {name: options.pop(name) for name in ("adapter", "chat_template", *_SHOWN)}
    sampling = from_dict(Sampling, given(options))
    from loftq.chatter import silenced  # and with it transformers, which takes seconds
    from loftq.training.chat import Chat
    from loftq.training.process import explain_memory
    from loftq.training.writer import open_writer

    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with silenced(), explain_memory():
        writer = open_writer(model, others.pop("adapter"), sampling, **others)
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # `input` then edits lines and recalls them
        how = "" if writer.templated else " It has no chat template, so each message is answered by itself."
        echo(f"{model} on {writer.opened.model.device}.{how} /help shows the commands.")
    stream = Wrapped.over(model_stream()) if terminal else model_stream()
    say = echo if terminal else _on_stderr
    session = Session(Chat(writer, system), _reader(terminal), say, stream, patient=terminal)
    session.run()
    if session.refused and not terminal:
        sys.exit(1)


def _reader(terminal: bool) -> Any:
    """What reads a line: `input` for a person, the standard input as it stands for a script."""
    return input if terminal else lambda _prompt: _next_line()


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _on_stderr(text: str) -> None:
    click.echo(visible(text, lines=True), err=True)
