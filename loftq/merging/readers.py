"""Settings of a model that change its outputs and that the reader of an export does not read.

Both sides are compared by what they read. On the side of transformers these are the settings that the code of the model
reads and whose value differs from the default of its configuration. On the side of mlx-lm these are the fields of the
model's arguments. Its files are parsed, not imported.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_ONLY_TRAINING = re.compile(r"drop|initializer|_coef$|_std$|^use_cache$|_token_id$|^output_|chunk_size|pretraining_tp")
_HEAD = "head_dim"
_WINDOW = "sliding_window"
_LAYERS = "layer_types"
_ROPE = "rope_parameters"
_OLD_ROPE = ("rope_theta", "rope_scaling")  # what exports write for readers that do not know `rope_parameters`
# The settings that loftq writes into a GGUF, or that show in the tensors there.
GGUF = frozenset(
    {
        *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "rms_norm_eps", "vocab_size", "max_position_embeddings", "tie_word_embeddings"),
        *("rope_theta", "rope_scaling", "attention_bias", "mlp_bias"),
    }
)


def active_settings(model: Any) -> dict[str, Any]:
    """The settings by which the outputs of a model differ from those of its type with the default configuration."""
    from transformers import PretrainedConfig

    config = model.config.get_text_config()
    default = type(config)(num_hidden_layers=config.num_hidden_layers).to_dict()
    code = inspect.getsource(sys.modules[type(model).__module__])
    general = set(PretrainedConfig().to_dict()) - {"tie_word_embeddings"}
    active = {}
    for key, value in config.to_dict().items():
        read = re.search(rf"\b{re.escape(key)}\b", code) is not None or key in (_WINDOW, _LAYERS)
        if key in general or not read or _ONLY_TRAINING.search(key) or (value == default.get(key) and key != _WINDOW):
            continue
        active[key] = value
    return {key: value for key, value in active.items() if not _is_inert(config, key, value)}


def _is_inert(config: Any, key: str, value: Any) -> bool:
    """Whether a value only says what also holds without it."""
    if key == _HEAD:
        return bool(value is None or value * config.num_attention_heads == config.hidden_size)
    if key == _LAYERS:
        return value is None or set(value) == {"full_attention"}
    if key == _WINDOW:
        layers = getattr(config, _LAYERS, None)
        unused = getattr(config, "use_sliding_window", True) is False
        slides = layers is None or any(layer != "full_attention" for layer in layers)
        return value is None or unused or not slides or value >= getattr(config, "max_position_embeddings", value + 1)
    return key == "use_sliding_window" or (value is None or value is False)


def unread(active: Mapping[str, Any], fields: Iterable[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that a reader with these fields does not read. `config` is the configuration that is exported."""
    known, text = set(fields), config.get("text_config", config)
    left = {key: value for key, value in active.items() if key not in known}
    needs_layers = _LAYERS in known and not text.get(_LAYERS)  # else the window of this reader applies to no layer
    if _WINDOW in active and needs_layers:
        left[_WINDOW] = active[_WINDOW]
    rope = left.get(_ROPE)
    if isinstance(rope, Mapping):
        scaled = rope.get("rope_type", "default") != "default"
        if set(_OLD_ROPE[: 1 + scaled]) <= known and not any(isinstance(part, Mapping) for part in rope.values()):
            del left[_ROPE]
    return left


def mlx_notes(model: Any, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes for an export to MLX about settings that the installed mlx-lm does not read."""
    active = active_settings(model)
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        if not active:
            return ()
        return (f"mlx-lm is not installed, so nothing was checked of how it reads {_listed(active)}",)
    package = Path(next(iter(spec.submodule_search_locations)))
    kind = str(model.config.get_text_config().model_type)
    kind = _remapping(package).get(kind, kind)
    path = package / "models" / f"{kind}.py"
    if not re.fullmatch(r"[\w.-]+", kind) or not path.is_file():
        return (f"the installed mlx-lm has no model of type {kind!r}: it cannot load this folder",)
    left = unread(active, _fields(path), config)
    rope = active.get(_ROPE) or {}
    rope_type = rope.get("rope_type", "default") if isinstance(rope, Mapping) else "default"
    readable = path.read_text(encoding="utf-8") + (package / "models" / "rope_utils.py").read_text(encoding="utf-8")
    if f'"{rope_type}"' not in readable:
        left[_ROPE] = rope
    return _note("mlx-lm", left)


def gguf_notes(model: Any, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes for an export to GGUF about settings that are not written into the file."""
    left = unread(active_settings(model), GGUF, config)
    left.pop(_LAYERS, None)
    window = left.pop(_WINDOW, None)
    limited = "GGUF does not hold the sliding window of this model: the length of its context is limited to"
    return (*((f"{limited} {window} tokens",) if window is not None else ()), *_note("the reader of this GGUF", left))


def _note(reader: str, left: Mapping[str, Any]) -> tuple[str, ...]:
    if not left:
        return ()
    return (
        f"{reader} does not read {_listed(left)}, which changes the outputs of this model: "
        "compare them with those before the merge",
    )


def _listed(settings: Mapping[str, Any]) -> str:
    texts = {key: str(value) for key, value in sorted(settings.items())}
    return ", ".join(f"{key} ({text if len(text) < 60 else text[:57] + '...'})" for key, text in texts.items())


def _fields(path: Path) -> set[str]:
    """The fields of the arguments of a model of mlx-lm; of a class that it inherits from another file, none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Args")]
    lines = [line for node in classes for line in node.body if isinstance(line, ast.AnnAssign)]
    return {line.target.id for line in lines if isinstance(line.target, ast.Name)}


def _remapping(package: Path) -> dict[str, str]:
    """The names under which mlx-lm runs model types that have no file of their own."""
    for node in ast.parse((package / "utils.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "MODEL_REMAPPING":
            return dict(ast.literal_eval(node.value))
    return {}
