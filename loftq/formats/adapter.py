"""The adapter folder as peft reads it: `adapter_config.json` and `adapter_model.safetensors`.

Only fields that every peft since 0.10 supports are written, because older releases refuse unknown fields. The factors
of fused experts need peft 0.19 (`expert_factors`). `init_lora_weights` is true, because any other value makes peft
initialize the adapter again when it is loaded. `loftq_config` is an empty object, because null has crashed loaders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.errors import ArtifactError
from loftq.formats import expert_factors
from loftq.formats.checkpoint import TensorSpec, spec_of
from loftq.formats.links import refuse_links
from loftq.formats.model_files import model_file_names
from loftq.formats.schema import check_value, json_text, number, read_json, whole
from loftq.formats.tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch

FOLDER = "loftq_init"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's name for the wrapped model
_AGAIN = "copy or download the adapter again"
_SCHEMA = {"peft_type": str, "base_model_name_or_path?": (str, None), "task_type?": (str, None)}
_LORA = {  # what loftq reads of a LoRA's configuration; peft knows more keys
    "r": whole(1, 2**31),
    "lora_alpha": number(),
    "target_modules?": ([str], str, None),
    "modules_to_save?": ([str], None),
    "target_parameters?": ([str], None),
    "use_rslora?": (bool, None),
    "use_qalora?": (bool, None),
    "lora_dropout?": number(0),
    "rank_pattern?": ({str: whole(1, 2**31)}, None),
    "alpha_pattern?": ({str: float}, None),
}
_POOLED = {"qalora_group_size": whole(1, 2**31)}


def scaling(alpha: float, rank: int, rslora: bool) -> float:
    """The factor by which peft multiplies B·A: alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA."""
    return alpha / (rank**0.5 if rslora else rank)


def keys(module: str) -> tuple[str, str]:
    """The names of A and B in the adapter's file."""
    return key_of(f"{module}.lora_A.weight"), key_of(f"{module}.lora_B.weight")


def key_of(parameter: str) -> str:
    """The name in the adapter's file of a parameter that is saved beside the factors, such as a head's."""
    return f"{_PREFIX}{parameter}"


def is_key(name: str) -> bool:
    """Whether a name has the form of the names in the adapter's file."""
    return name.startswith(_PREFIX)


def factor_keys(module: str, shape: Sequence[int]) -> tuple[str, str]:
    """The names of A and B of a linear, or of the parameter of fused experts, whose shape has three sides."""
    return keys(module if len(shape) == 2 else expert_factors.path_of(module))


def specs(module: str, shape: Sequence[int], rank: int, pool_size: int | None = None) -> list[TensorSpec]:
    """A (rank, in), for QA-LoRA (rank, in / pool), and B (out, rank), in float32, in which peft trains them."""
    a, b = factor_keys(module, shape)
    if len(shape) == 3:
        return expert_factors.specs(a, b, shape, rank)
    import torch

    inputs = shape[1] // (pool_size or 1)
    return [TensorSpec(a, torch.float32, (rank, inputs)), TensorSpec(b, torch.float32, (shape[0], rank))]


def config_text(
    base_model: str,
    target_modules: Sequence[str],
    *,
    rank: int,
    alpha: float,
    rslora: bool,
    dropout: float,
    task_type: str | None,
    modules_to_save: Sequence[str] = (),
    pool_size: int | None = None,
    target_parameters: Sequence[str] = (),
    expert_rank: int | None = None,
    expert_alpha: float | None = None,
    revision: str | None = None,
) -> str:
    """The text of `adapter_config.json`. With a pool size it is that of a QA-LoRA, which peft supports since 0.18.

    `target_parameters` are those of fused experts, which have a rank and an alpha of their own. `revision` is that of
    the base model on the Hub.
    """
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": list(target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "modules_to_save": list(modules_to_save) or None,
    }
    if revision is not None:
        config["revision"] = revision
    if pool_size is not None:
        config |= {"use_qalora": True, "qalora_group_size": pool_size}
    if target_parameters:
        config["target_parameters"] = list(target_parameters)
        if expert_rank != rank:
            config["rank_pattern"] = dict.fromkeys(target_parameters, expert_rank)
            config["alpha_pattern"] = dict.fromkeys(target_parameters, expert_alpha)
    return json_text(config, indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Adapter:
    """The folder of an adapter: its configuration, and the shapes of its tensors by name.

    `opened` is the file of its tensors, if its header was read here.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    opened: TensorFiles | None = field(default=None, repr=False, compare=False)

    @property
    def kind(self) -> str:
        """The kind of adapter, in words for a person."""
        if self.config.get("peft_type") != "LORA":
            return str(self.config.get("peft_type"))
        return "plain LoRA" if self.pool_size is None else f"QA-LoRA (pools of {self.pool_size})"

    @property
    def pool_size(self) -> int | None:
        """Number of inputs in a pool of QA-LoRA; None for a plain LoRA."""
        return int(self.config["qalora_group_size"]) if self.config.get("use_qalora") else None

    @property
    def scaling(self) -> float:
        """The factor by which B·A is multiplied, unless a module has one of its own."""
        return scaling(self.config["lora_alpha"], self.config["r"], bool(self.config.get("use_rslora")))

    def rank_of(self, module: str) -> int:
        """The rank of the factors of a module, or of each expert of a parameter."""
        return int(self._of_pattern("rank_pattern", module, self.config["r"]))

    def scaling_of(self, module: str) -> float:
        """The factor by which B·A of a module is multiplied."""
        alpha = self._of_pattern("alpha_pattern", module, self.config["lora_alpha"])
        return scaling(alpha, self.rank_of(module), bool(self.config.get("use_rslora")))

    def _of_pattern(self, key: str, module: str, usual: float) -> float:
        """The value of the first pattern that matches the end of a name, as peft reads the patterns."""
        for pattern, value in (self.config.get(key) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return float(value)
            except re.error as error:
                raise ArtifactError(f"{self.folder / CONFIG}: {key} has {pattern!r} ({error}): {_AGAIN}") from error
        return usual

    @property
    def modules(self) -> list[str]:
        """The names in the model of the modules that have factors, and of the parameters of fused experts."""
        return list(self._paths)

    @cached_property
    def _paths(self) -> dict[str, str]:
        """The name under which the factors of each module or parameter are saved."""
        end, targets = ".lora_A.weight", self.config.get("target_parameters") or ()
        paths = [name.removeprefix(_PREFIX).removesuffix(end) for name in self.shapes if name.endswith(end)]
        return {expert_factors.parameter_of(path, targets) or path: path for path in paths}

    def keys(self, module: str) -> tuple[str, str]:
        """The names of A and B of a module in the file."""
        return keys(self._paths.get(module, module))

    def experts(self, module: str) -> int:
        """The number of experts that have factors; 0 for a linear."""
        if self._paths[module] == module:
            return 0
        return self.shapes[self.keys(module)[0]][0] // self.rank_of(module)

    def adapts(self, module: str) -> bool:
        """Whether a module has factors."""
        return module in self._paths

    @cached_property
    def saved(self) -> dict[str, str]:
        """Parameters that are saved in full beside the factors (a head): name in the model to name in the file."""
        names = [name for name in self.shapes if ".lora_" not in name and name not in self.copies]
        return {name.removeprefix(_PREFIX): name for name in names}

    @cached_property
    def copies(self) -> dict[str, str]:
        """Second copies, which peft adds for resized embeddings and never reads, and the tensors that it reads."""
        parts = (".modules_to_save.", ".original_module.")
        plain = {name: name.replace(part, ".") for name in self.shapes for part in parts if part in name}
        return {name: right for name, right in plain.items() if right in self.shapes}

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in), for QA-LoRA (rank, in / pool), and B (out, rank) of a module: float32."""
        a, b = (self.read(key).float() for key in self.keys(module))
        return a, b

    def expert_factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """All A (experts, rank, in) and all B (experts, out, rank) of a parameter of fused experts: float32."""
        return expert_factors.by_expert(*self.factors(module), self.experts(module))

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name in the file."""
        data = self._opened.read(WEIGHTS, name)
        place = self._opened.places(WEIGHTS)[name]
        spec = spec_of(name, place.code, place.shape, str(self.folder / WEIGHTS))
        return data.view(spec.dtype).view(spec.shape)

    @cached_property
    def _opened(self) -> TensorFiles:
        return self.opened or TensorFiles(self.folder, ArtifactError, _AGAIN)


def open_adapter(folder: Path) -> Adapter:
    """Open the folder of a peft adapter. Raises ArtifactError if it is not one, is damaged, or is not complete."""
    adapter = read_adapter(folder)
    check_factors(adapter)
    return adapter


def read_adapter(folder: Path) -> Adapter:
    """Open the folder of a peft adapter, without checking that its tensors fit its configuration."""
    config = read_config(folder)
    refuse_links(folder, model_file_names(folder), ArtifactError)
    opened = TensorFiles(folder, ArtifactError, _AGAIN)
    shapes = {name: place.shape for name, place in opened.places(WEIGHTS).items()}
    return Adapter(folder, config, shapes, opened)


def check_factors(adapter: Adapter) -> None:
    """Raise ArtifactError unless every A has its B, and both have the rank of the configuration."""
    if adapter.config["peft_type"] != "LORA":
        return
    empty = [name for name, shape in adapter.shapes.items() if 0 in shape]
    if empty or not adapter.shapes:
        raise ArtifactError(f"{adapter.folder / WEIGHTS} is empty{f' in {empty[0]}' if empty else ''}: {_AGAIN}")
    for module in adapter.modules:
        a, b = (adapter.shapes.get(key, ()) for key in adapter.keys(module))
        if min(len(a), len(b)) < 2:
            raise ArtifactError(f"{adapter.folder / WEIGHTS} holds no complete pair of factors of {module!r}: {_AGAIN}")
        rank = adapter.config["r"]
        count = max(adapter.experts(module), 1)
        if not adapter.config.get("rank_pattern") and (a[0], b[1]) != (rank * count, rank * count):
            raise ArtifactError(
                f"{adapter.folder / CONFIG}: r is {rank}, but the factors of {module!r} have rank {a[0]} and {b[1]} in "
                f"{WEIGHTS}: {_AGAIN}"
            )


def check_values(adapter: Adapter) -> None:
    """Raise ArtifactError if a tensor of an adapter holds a value that is not a finite number."""
    for name in adapter.shapes:
        tensor = adapter.read(name)
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ArtifactError(
                f"{adapter.folder / WEIGHTS}: {name} holds values that are not finite numbers: "
                "train the adapter again, or copy it again"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in the folder of a peft adapter. Raises ArtifactError if it is missing or damaged."""
    path = folder / CONFIG
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {CONFIG}: expected the folder of a peft adapter")
    refuse_links(folder, [CONFIG], ArtifactError)
    config: dict[str, Any] = read_json(path, _SCHEMA, advice=_AGAIN)
    if config["peft_type"] == "LORA":
        check_value(config, _LORA | (_POOLED if config.get("use_qalora") else {}), path, advice=_AGAIN)
    return config
