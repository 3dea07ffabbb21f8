"""`config.json` of a model: the file that transformers builds the model from.

transformers builds a configuration of a billion layers for hours, so the counts in it are compared with the checkpoint
before anything is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loftq.errors import LoftQError, SourceError
from loftq.formats.checkpoint import INDEX, SINGLE, read_index
from loftq.formats.schema import json_text, number, read_json, shown, whole

FILE = "config.json"
_AGAIN = "download it again"
_SCHEMA = {"model_type?": (str, None), "architectures?": ([str], None)}
_COUNTS = re.compile(r"(layers?|blocks|experts?|stages|groups|depths?|attention_types)$")  # each makes modules
_TOKEN = (str, dict, None)
_IDS = (whole(), [whole()], None)
_BESIDE = {  # files that transformers reads beside it, and the values in them that its errors do not name
    "tokenizer_config.json": {
        "model_max_length?": (number(0), None),
        "tokenizer_class?": (str, None),
        "chat_template?": (str, list, dict, None),
        **dict.fromkeys((f"{name}_token?" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")), _TOKEN),
    },
    "generation_config.json": {
        **dict.fromkeys((f"{name}_token_id?" for name in ("eos", "bos", "pad", "decoder_start")), _IDS),
        **dict.fromkeys(("temperature?", "top_p?", "repetition_penalty?", "length_penalty?"), (float, None)),
        **dict.fromkeys(("max_length?", "max_new_tokens?", "min_length?", "top_k?", "num_beams?"), (whole(), None)),
        **dict.fromkeys(("do_sample?", "use_cache?"), (bool, None)),
    },
}
_FEWEST = 64  # a model may use the same tensors in several layers
_MOST = 4096  # where there is no checkpoint to compare with
_LIMITS = {  # other numbers for which code of models makes tables
    re.compile(r"labels$"): 1_000_000,
    re.compile(r"(size|dims?|positions|embeddings|vocab|embd|d_model|d_ff|n_inner|n_ctx|channels|heads?)$"): 2**24,
}


def read_config(folder: Path, error: type[LoftQError] = SourceError, tensors: int | None = None) -> dict[str, Any]:
    """The content of a folder's `config.json`. Raises `error` if it is missing or damaged.

    A configuration with far more layers than the checkpoint has tensors is refused too. `tensors` is their number, if
    the folder does not hold the checkpoint itself.
    """
    path = folder / FILE
    if not path.is_file():
        raise error(f"{folder} has no {FILE}: expected a model that transformers saved")
    config: dict[str, Any] = read_json(path, _SCHEMA, error=error, advice=_AGAIN, foreign=True)
    for key, last, value in _numbers(config):
        if _COUNTS.search(last) and value > _FEWEST:
            tensors = _count_tensors(folder) if tensors is None else tensors
            if value > max(_FEWEST, tensors):
                expected = f"at most {max(_FEWEST, tensors)}, because the checkpoint has {tensors} tensors"
                raise error(f"{path} is damaged ({key} is {shown(value)}, expected {expected}): {_AGAIN}")
        for names, most in _LIMITS.items():
            if names.search(last) and value > most:
                raise error(f"{path} is damaged ({key} is {shown(value)}, expected at most {most}): {_AGAIN}")
    return config


def check_beside(folder: Path, error: type[LoftQError] = SourceError) -> None:
    """Raise `error` if a configuration beside `config.json` has values that make no sense."""
    for name, schema in _BESIDE.items():
        if (folder / name).is_file():
            read_json(folder / name, schema, error=error, advice=_AGAIN, foreign=True)


def with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the settings of the rotary embedding also under the names of transformers before 5.

    Many other readers, mlx-lm among them, know only these and take their own default for what is in `rope_parameters`.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return dict(config)
    rotary = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaled = rope.get("rope_type", "default") != "default"
    return {**rotary, **({"rope_scaling": {**rope, "type": rope["rope_type"]}} if scaled else {}), **config}


def config_text(config: Mapping[str, Any]) -> str:
    """The text of a `config.json`. transformers reads infinities from objects, because JSON has no infinities."""
    return json_text(_tagged(config), indent=2, sort_keys=True) + "\n"


def _tagged(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tagged(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tagged(part) for part in value]
    is_infinite = isinstance(value, float) and math.isinf(value)
    return {"__float__": "Infinity" if value > 0 else "-Infinity"} if is_infinite else value


def _count_tensors(folder: Path) -> int:
    """The number of tensors in the checkpoint of a folder, from its index or its header."""
    try:
        if (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, "pt") as file:
                return len(file.keys())
        return len(read_index(folder)) if (folder / INDEX).is_file() else _MOST
    except (SafetensorError, OSError):  # whoever reads the weights says what is wrong with them
        return _MOST


def _numbers(value: Any, path: str = "", last: str = "") -> Iterator[tuple[str, str, int]]:
    """Each whole number of a configuration, with its path and the last name in it."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{path}.{key}" if path else key, key)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _numbers(part, f"{path}[{index}]", last)
    elif type(value) is int:
        yield path, last, value
