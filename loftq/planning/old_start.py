"""Folders of the original LoftQ script: 16-bit weights that lie on NF4, and an adapter in `loftq_init/`.

Such a folder is adopted: its weights become codes again, and its adapter is kept. The original script computed the
factors for a scaling of 1, whatever alpha and rank its configuration names.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from loftq.core.solvers.methods import WITHOUT_TEXT
from loftq.display import few_of
from loftq.errors import OptionError, SourceError
from loftq.formats.adapter import CONFIG, FOLDER, WEIGHTS, Adapter, open_adapter, read_config
from loftq.formats.artifact import MANIFEST
from loftq.formats.checkpoint import dtype_of
from loftq.formats.model_config import read_config as read_model_config
from loftq.hub.folder import fetch_folder
from loftq.hub.source import Source
from loftq.planning.plan import Plan
from loftq.planning.settings import QuantizeSettings
from loftq.settings import declared, plain, said

_log = logging.getLogger(__name__)
_FREE = ("alpha", "task", "max_shard_size", "seed")  # settings that may differ from those of the folder
BITS, CODEBOOK, BLOCK = 4, "nf4", 64  # of the original script


@dataclass(frozen=True)
class OldStart:
    """The folder of a model and its adapter."""

    source: Source
    adapter: Adapter

    def settings(self) -> dict[str, Any]:
        """The settings of `loftq quantize` that describe the folder."""
        config = self.adapter.config
        targets = config.get("target_modules")
        quantizing = config.get("loftq_config") or {}
        return {
            "bits": BITS,
            "method": WITHOUT_TEXT,
            "iters": max(int(quantizing.get("loftq_iter") or 1), 1),
            "rank": int(config["r"]),
            "alpha": float(config["lora_alpha"]),
            "rslora": bool(config.get("use_rslora")),
            "dropout": float(config.get("lora_dropout") or 0.0),
            "target_modules": tuple(targets if isinstance(targets, list) else self.adapter.modules),
            "compute_dtype": str(dtype_of(read_model_config(self.source.folder))).removeprefix("torch."),
        }


def is_old_start(source: Source) -> bool:
    """Whether a model's folder has the form of those that the original script wrote."""
    if (source.folder / MANIFEST).is_file() or not (source.folder / FOLDER / CONFIG).is_file():
        return False
    return not read_model_config(source.folder, tensors=len(source.checkpoint.tensors)).get("quantization_config")


def warn_of_unused(source: Source) -> None:
    """Warn that a model is used without its adapter if the original script wrote its folder."""
    if is_old_start(source):
        _log.warning(
            f"{source.name} has an adapter in {FOLDER}, which is not used: `loftq quantize {source.name}` makes a "
            f"folder with it, and --adapter {source.name}/{FOLDER} uses it here"
        )


def find_old_start(source: Source) -> OldStart | None:
    """The adapter of a model's folder that the original script wrote; None for any other folder.

    Raises ArtifactError for an adapter that is damaged, and SourceError for one that cannot be kept.
    """
    if not is_old_start(source):
        return None
    folder = source.folder
    if not source.local and source.revision is not None:
        patterns = [f"{FOLDER}/{name}" for name in (CONFIG, WEIGHTS)]
        folder = fetch_folder(source.name, revision=source.revision, patterns=patterns)
    where = folder / FOLDER
    if read_config(where)["peft_type"] == "LORA" and not (where / WEIGHTS).is_file():
        raise SourceError(
            f"{where} has no {WEIGHTS}: the adapter was saved with pickle, which loftq never reads, because it can run "
            "code: convert it to safetensors"
        )
    adapter = open_adapter(where)
    if adapter.kind != "plain LoRA" or adapter.saved:
        kept = f"a head ({few_of(list(adapter.saved))})" if adapter.saved else f"a {adapter.kind} adapter"
        raise SourceError(f"{where} has {kept}, which the original LoftQ script does not write: move it away")
    return OldStart(source, adapter)


def adopting(old: OldStart, requested: QuantizeSettings) -> QuantizeSettings:
    """The settings with which a folder is adopted. Raises OptionError for one that contradicts the folder."""
    own = old.settings()
    for name, value in said(requested).items():
        kept = plain(own.get(name, declared(QuantizeSettings)[name].default))
        if name not in _FREE and value != kept:
            shown = ",".join(value) if isinstance(value, list) else f"{value:g}" if type(value) is float else value
            raise OptionError(
                f"{declared(QuantizeSettings)[name].option} {shown}: {old.source.name} is quantized already, by the "
                f"original LoftQ script, and its adapter in {FOLDER} is kept ({name} {kept}): leave the option out, or "
                f"compute a new adapter with `loftq quantize ORIGINAL --backbone {old.source.name}`"
            )
    return replace(requested, **{name: value for name, value in own.items() if name not in said(requested)})


def check_modules(old: OldStart, plan: Plan) -> None:
    """Raise SourceError unless the adapter has factors for exactly the layers of a plan."""
    planned = {layer.module: layer.shape for layer in plan.layers}
    other = sorted(planned.keys() ^ set(old.adapter.modules))
    if other:
        has = "has no factors for" if other[0] in planned else "has factors for"
        raise SourceError(
            f"the adapter in {old.adapter.folder} {has} {other[0]!r}: expected factors for exactly the linears that "
            "are quantized"
        )
    for module, shape in planned.items():
        a, b = (old.adapter.shapes[key] for key in old.adapter.keys(module))
        if (b[0], a[1]) != tuple(shape):
            raise SourceError(
                f"the adapter in {old.adapter.folder} does not fit {module}: its factors are {a} and {b}, the weight "
                f"is {tuple(shape)}"
            )
