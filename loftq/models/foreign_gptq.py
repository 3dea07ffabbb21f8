"""A new QA-LoRA adapter on a GPTQ checkpoint that another program wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel
from torch import nn

from loftq.core.grid import ROW
from loftq.errors import OptionError
from loftq.formats.adapter_targets import target_names
from loftq.models.peft_targets import adapt


def new_qalora(
    base: nn.Module,
    folder: Path,
    rank: int,
    alpha: float,
    pool_size: int | None,
    dropout: float,
    target_modules: Sequence[str] | None,
) -> PeftModel:
    """Add an adapter to a loaded checkpoint; it adds nothing yet. Raises OptionError for targets that do not exist."""
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=dropout,
        target_modules=target_names(_targets(base, target_modules, folder), [name for name, _ in base.named_modules()]),
        use_qalora=True,
        qalora_group_size=pool_size or _group_size(base),
        task_type="CAUSAL_LM",
    )
    return adapt(base, config)


def _targets(base: nn.Module, wanted: Sequence[str] | None, folder: Path) -> list[str]:
    """The quantized linears whose names end with one of the wanted ones."""
    quantized = [name for name, module in base.named_modules() if hasattr(module, "qweight")]
    for end in wanted or ():
        if not any(f".{name}".endswith(f".{end}") for name in quantized):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in quantized}))
            raise OptionError(f"--target-modules {end!r} matches no quantized linear of {folder} (it has: {known})")
    return [name for name in quantized if wanted is None or any(f".{name}".endswith(f".{end}") for end in wanted)]


def _group_size(base: Any) -> int:
    actual = int(base.config.quantization_config.group_size)
    if actual == ROW:
        raise OptionError("this checkpoint has one group for each row: set pool_size, the number of inputs in a pool")
    return actual
