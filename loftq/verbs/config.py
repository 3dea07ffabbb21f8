"""`loftq config`: writes the configuration with which another training tool starts from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.artifacts.tools import TOOLS, Start, Tool, check_tool
from loftq.errors import ArtifactError, OptionError, OutputError
from loftq.formats.adapter import open_adapter
from loftq.formats.artifact import Artifact, open_artifact
from loftq.formats.bitsandbytes import METHOD as BITSANDBYTES
from loftq.formats.disk import explain_os_errors, write_whole
from loftq.formats.layouts import LAYOUTS
from loftq.models.merged import WITH_ADAPTER

_TASK = "causal-lm"  # what the tools train
_WIDTHS = (4, 8)  # those of bitsandbytes, which is all that tools without loftq are known to take


@dataclass(frozen=True)
class Configuration:
    """A configuration: its text, and the file that was written.

    `ran` says whether the tool was run with it in this version, or its source was read.
    """

    text: str
    tool: str
    version: str
    ran: bool
    output: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {**vars(self), "output": None if self.output is None else str(self.output)}


def config(
    folder: str | Path,
    tool: str,
    *,
    stage: str = "sft",
    data: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Configuration:
    """The configuration with which `tool` starts training from a folder that `loftq quantize` wrote.

    `stage` is "sft" or "dpo". `data` is the name of the training data, as the tool wants it. With `output` the text is
    written to a file. Raises ArtifactError if the folder is not one, OptionError if the tool cannot start from it, and
    OutputError if the file exists already.
    """
    check_tool(tool, stage)
    if data is not None and (not data or not data.isprintable()):
        raise OptionError(f"--data {data!r}: expected the name of a file or a data set")
    row = TOOLS[tool]
    artifact = open_artifact(folder)
    _check(artifact, tool, row)
    written = None if output is None else Path(output).expanduser()
    if written is not None and written.exists() and (written.is_dir() or not overwrite):
        raise OutputError(f"{written} exists already: " + ("name a file" if written.is_dir() else "add --overwrite"))
    start = _start(artifact, stage, row.data[stage] if data is None else data)
    basis = "tried with" if row.ran else "from the source of, and not tried with,"
    heading = f"# Written by loftq, {basis} {row.title} {row.version}.\n"
    result = Configuration(heading + row.write(start), tool, row.version, row.ran, written)
    if written is not None:
        if not written.parent.is_dir():
            raise OutputError(f"{written.parent} is not a folder: make it, or name another --output")
        with explain_os_errors(written):
            write_whole(written, result.text)
    return result


def _check(artifact: Artifact, tool: str, row: Tool) -> None:
    """Raise unless the tool can start from the folder."""
    folder, manifest = artifact.folder, artifact.manifest
    if manifest["kind"] not in WITH_ADAPTER:
        raise ArtifactError(
            f"{folder} is a {manifest['kind']} folder: name one with a backbone and its initial adapter, which "
            "`loftq quantize` writes"
        )
    task = manifest["source"]["task"]
    if task != _TASK:
        raise OptionError(f"--for {tool}: {folder} is for {task}, and these configurations train {_TASK} models")
    instead = row.instead.get(manifest["format"])
    if instead is not None:
        raise OptionError(
            f"--for {tool}: {folder} is in the format {manifest['format']}: quantize with --format {instead}"
        )
    stock = LAYOUTS[manifest["format"]].METHOD == BITSANDBYTES and manifest["recipe"]["bits"] in _WIDTHS
    if not stock and not row.imports_loftq:
        reads = LAYOUTS[BITSANDBYTES].HOLDS
        taken = ", ".join(name for name, other in TOOLS.items() if other.imports_loftq and not other.instead)
        raise OptionError(
            f"--for {tool}: {folder} is in the format {manifest['format']}, which {row.title} cannot load, because it "
            f"does not import loftq: use --for {taken} or `loftq train`, or quantize with --format bitsandbytes "
            f"({reads})"
        )
    base = str(open_adapter(artifact.adapter).config.get("base_model_name_or_path"))
    if row.adapter_alone and Path(base).resolve() != folder.resolve():
        raise OptionError(
            f"--for {tool}: it finds the backbone by the adapter, which names {base}: "
            f"run `loftq relocate {folder}` first"
        )


def _start(artifact: Artifact, stage: str, data: str) -> Start:
    recipe, adapter = artifact.manifest["recipe"], open_adapter(artifact.adapter)
    targets = adapter.config.get("target_modules") or ()
    return Start(
        folder=str(artifact.folder.resolve()),
        adapter=str(artifact.adapter.resolve()),
        kind=artifact.manifest["kind"],
        bits=int(recipe["bits"]),
        rank=adapter.config["r"],
        alpha=adapter.config["lora_alpha"],
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        stage=stage,
        data=data,
    )
