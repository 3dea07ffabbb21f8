"""`loftq config`."""

from __future__ import annotations

import click

import loftq
from loftq.artifacts.tools import STAGES, TOOLS, check_tool
from loftq.display import visible

from .options import Command, as_json, debug, names_of, option, overwrite
from .output import echo, echo_json

_EPILOG = """\b
Examples:
  loftq config my-model --for axolotl --output axolotl.yaml
  loftq config my-model --for llama-factory --stage dpo --data my_pairs > dpo.yaml
  loftq config my-model --for trl --output train.py
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("folder", metavar="DIR", type=click.Path())
@option(
    "--for",
    "tool",
    group="training",
    required=True,
    metavar="TOOL",
    help=f"The tool: {', '.join(TOOLS)}.",
    shell_complete=names_of(TOOLS),
)
@option(
    "--stage",
    group="training",
    default="sft",
    show_default=True,
    help=f"What is trained: {', '.join(f'{name} ({meaning})' for name, meaning in STAGES.items())}.",
    shell_complete=names_of(STAGES),
)
@option("--data", group="data", metavar="NAME", help="Training data, in the tool's own words.")
@option("--output", group="output", metavar="FILE", type=click.Path(), help="File to write.  [default: stdout]")
@overwrite
@as_json
@debug
def config(
    folder: str, tool: str, stage: str, data: str | None, output: str | None, overwrite: bool, as_json: bool
) -> None:
    """Print the configuration with which another training tool starts from DIR and its adapter.

    DIR is a folder that `loftq quantize` wrote. The page on other tools in the documentation says what to mind in each.
    """
    check_tool(tool, stage)  # before torch is imported
    result = loftq.config(folder, tool, stage=stage, data=data, output=output, overwrite=overwrite)
    if as_json:
        echo_json(result.to_dict())
    elif result.output is None:
        echo(result.text, nl=False)
    else:
        click.echo(visible(str(result.output)))
