"""The command group, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import gc
import io
import os
import re
import sys
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from loftq.display import visible
from loftq.errors import LoftQError
from loftq.secrets import redacted

from .notices import shown_notices
from .output import Context, fitting_lines, styled

_COMMANDS = {
    "quantize": "Quantize a model and initialize its LoRA adapter.",
    "train": "Train the adapter of a quantized model, or a new one.",
    "evaluate": "Measure perplexity, answers, classes, or tasks of lm-eval.",
    "generate": "Write text with a model and its adapter.",
    "chat": "Talk with a model and its adapter.",
    "config": "Write the configuration of another training tool.",
    "convert": "Write a folder in another format with the same codes.",
    "merge": "Merge an adapter into the backbone that it was trained on.",
    "push": "Upload a folder to the Hub.",
    "relocate": "Let an adapter name its backbone again, after a move.",
    "inspect": "Show what is in a folder, a repository or an adapter.",
    "verify": "Compare a folder with its loftq.json, and with its source.",
    "report": "Compare folders side by side, as a page, a picture or a table.",
    "sweep": "Quantize and measure a model in many ways, and compare them.",
    "zoo": "List, show and build recipes for known models.",
    "methods": "Show what each method minimizes, needs and costs.",
    "families": "Show which model types are known, and what is quantized in them.",
    "doctor": "Look at this machine: libraries, devices, what works.",
    "completion": "Print the lines with which a shell completes commands.",
}
_CONTINUE = {
    "quantize": "add --resume",
    "train": "add --resume",
    "merge": "add --resume",
    "push": "run the same command again",
    "sweep": "run the same command again",
}
_VERSIONS = ("loftq", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "huggingface_hub", "numba")


def _print_versions(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version
        from platform import python_version

        click.echo("\n".join([*(f"{name} {version(name)}" for name in _VERSIONS), f"python {python_version()}"]))
        context.exit()


class _Commands(click.Group):
    """Each command is imported when it is run: torch takes seconds, in which Ctrl-C may come."""

    context_class = Context

    def list_commands(self, _context: click.Context) -> list[str]:
        """The commands in the order in which they are used."""
        return list(_COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        """The command from the file of its name."""
        return getattr(import_module(f".{name}", __package__), name) if name in _COMMANDS else None

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """One line for each command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names with their lines. A shell waits for this, so no command is imported."""
        names = [CompletionItem(name, help=line) for name, line in _COMMANDS.items() if name.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, context, incomplete)]


@click.group(
    cls=_Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_versions, help="Show versions."
)
def cli() -> None:
    """A better start for fine-tuning quantized language models: LoftQ and calibrated methods."""


def main(args: list[str] | None = None) -> Any:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    if args is None and not sys.warnoptions:
        _silence_libraries()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch makes large blocks of huge pages, which is faster
    gc.set_threshold(100_000)  # torch and transformers make a million objects that stay
    arguments = sys.argv[1:] if args is None else args
    try:
        with fitting_lines(), shown_notices("--quiet" in arguments):
            return cli.main(args=arguments, prog_name="loftq", standalone_mode=False)
    except click.exceptions.Abort:
        way = _CONTINUE.get(next(iter(arguments), ""))
        click.echo("interrupted" + (f": finished work is kept, {way} to continue" if way else ""), err=True)
        sys.exit(130)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo(redacted(shown.getvalue()), nl=False, err=True)  # it may quote an argument
        sys.exit(error.exit_code)
    except MemoryError:
        _show_error("out of memory: use fewer --workers (--dry-run shows how much memory one needs)")
        sys.exit(1)
    except Exception as error:
        limit = _out_of_files(error)
        if "--debug" in arguments or not (limit or isinstance(error, LoftQError)):
            raise
        _show_error(limit or str(error))
        sys.exit(1 if limit else getattr(error, "exit_code", 1))
    finally:
        gc.freeze()  # at the end they need not be searched for cycles, which takes a second


def _out_of_files(error: BaseException) -> str | None:
    """The message for an error that comes from a limit of open files, whatever was read or written; else None."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:  # a chain may be a circle
        seen.add(id(link))
        number = link.errno if isinstance(link, OSError) else None
        if number in (errno.EMFILE, errno.ENFILE) or re.search(r"Too many open files|os error 2[34]\b", str(link)):
            return "too many files are open in this process: raise the limit with `ulimit -n 65536`, and run again"
        link = link.__cause__ or link.__context__
    return None


def _show_error(message: str) -> None:
    """Print an error on stderr, over the line that a progress bar may have left."""
    bar = "\r\x1b[K" if sys.stderr.isatty() else ""
    click.echo(f"{bar}{styled('Error:', err=True, fg='red', bold=True)} {visible(message)}", err=True)


def _silence_libraries() -> None:
    """Hide what libraries tell each other: in a command of its own nobody can act on it."""
    import logging
    import warnings

    warnings.simplefilter("ignore", FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # kernels that are optional


if __name__ == "__main__":
    main()
