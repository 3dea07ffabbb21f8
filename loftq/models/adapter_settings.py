"""Settings of an adapter that change what it computes. What loftq does not know is refused, never ignored.

Every setting whose value differs from the default of peft's LoraConfig counts, so this needs no list of the settings
that exist today. The only list is of those that loftq honours or that have no effect on a trained adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loftq.errors import ArtifactError, OptionError
from loftq.formats.adapter import CONFIG, Adapter

_HONOURED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_qalora", "qalora_group_size", "modules_to_save"),
    *("rank_pattern", "alpha_pattern"),
}
_SELECTION = {
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}  # the factors show these
_WITHOUT_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",
    "runtime_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "ensure_weight_tying",
}
_KNOWN = _HONOURED | _SELECTION | _WITHOUT_EFFECT
_KEEP_THE_WEIGHTS = (True, False, None, "gaussian", "eva", "orthogonal")  # other ways to begin change the base model
_EMPTY: tuple[Any, ...] = (None, False, "", [], {})


def check_mergeable(adapter: Adapter) -> None:
    """Raise OptionError for a setting that changes what an adapter computes and that merging does not know."""
    if adapter.config["peft_type"] != "LORA":
        raise OptionError(f"{adapter.folder} is a {adapter.kind} adapter, and loftq merges LoRA: use peft's own merge")
    for key, value in _unknown(adapter):
        if key != "init_lora_weights" or value not in _KEEP_THE_WEIGHTS:
            raise OptionError(f"{adapter.folder} has {key} {value!r}, which loftq cannot merge: use peft's own merge")


def check_loadable(adapter: Adapter) -> None:
    """Raise ArtifactError for a setting that the installed peft does not know, and would ignore."""
    if adapter.config["peft_type"] != "LORA":
        return
    defaults = _defaults()
    for key, value in _unknown(adapter):
        if key not in defaults:
            raise ArtifactError(
                f"{adapter.folder / CONFIG} has {key} {value!r}, which the installed peft does not know: upgrade peft"
            )


def _unknown(adapter: Adapter) -> Iterator[tuple[str, Any]]:
    """The settings outside `_KNOWN` whose value differs from peft's default."""
    defaults = _defaults()
    for key, value in adapter.config.items():
        if key not in _KNOWN and value not in _EMPTY and value != defaults.get(key):
            yield key, value


def _defaults() -> dict[str, Any]:
    from peft import LoraConfig

    return dict(LoraConfig().to_dict())
