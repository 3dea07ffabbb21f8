"""`loftq completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_EPILOG = """\b
Examples:
  eval "$(loftq completion bash)"                                    # in ~/.bashrc
  eval "$(loftq completion zsh)"                                     # in ~/.zshrc, after compinit
  loftq completion fish > ~/.config/fish/completions/loftq.fish
"""
SHELLS = ("bash", "zsh", "fish")


@click.command(epilog=_EPILOG)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the lines with which a shell completes commands, options, and files."""
    root = context.find_root()
    completion_class = get_completion_class(shell)
    if completion_class is None:
        raise click.UsageError(f"click has no completion for {shell}")
    click.echo(completion_class(root.command, {}, "loftq", "_LOFTQ_COMPLETE").source())
