"""Asks peft which modules it adapts, and makes sure that it adapts the modules of a configuration and no others.

peft refuses LoRA on some modules of state space models. For model types with fused experts it also changes the
configuration (peft issue 3711, since 0.19): it takes `gate_proj`, `up_proj` and `down_proj` for the names of experts
before transformers 5, and adapts fused experts in place of dense layers that still have these names. The adapters of
the dense layers are then lost without an error. This module asks peft itself about both, so it needs no list of models.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from loftq.display import one_line
from loftq.errors import ArtifactError, OptionError
from loftq.formats.adapter import CONFIG, Adapter, check_values, key_of, open_adapter
from loftq.models.adapter_settings import check_loadable
from loftq.models.refusals import explain_loading

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

_as_named: ContextVar[bool] = ContextVar("as_named", default=False)


def refused(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """The modules to which peft refuses to add LoRA in a model of this type."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)  # peft before 0.18 does not refuse any
    config = LoraConfig()

    def is_refused(module: str) -> bool:
        if check is None:
            return False
        try:
            check(config, model, module.rpartition(".")[2])
        except ValueError:
            return True
        return False

    return [module for module in modules if is_refused(module)]


def redirected(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """The modules whose LoRA peft would put on other parameters of a model of this type."""
    conversion = _conversion()
    targets = list(modules)
    if conversion is None or not targets:
        return []
    from peft import LoraConfig

    left = []
    for last in {target.rpartition(".")[2] for target in targets}:
        config = LoraConfig(target_modules=[last])
        try:
            conversion.convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # peft demands that several names are redirected together
            continue
        if last in (config.target_modules or ()):
            left.append(last)
    return [target for target in targets if target.rpartition(".")[2] not in left]


@contextmanager
def as_named() -> Iterator[None]:
    """Make peft adapt the modules that a configuration names, without redirecting any of them."""
    _install()
    token = _as_named.set(True)
    try:
        yield
    finally:
        _as_named.reset(token)


@contextmanager
def _trusting_patterns() -> Iterator[None]:
    """Silence peft's warning about patterns of ranks and alphas that name parameters: it honours them all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        yield


def adapt(model: Any, config: LoraConfig) -> PeftModel:
    """Add a new adapter to a model. Raises OptionError if peft refuses it."""
    from peft import get_peft_model

    with as_named(), _trusting_patterns():
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise OptionError(f"peft refuses this adapter: {one_line(error)}") from error


def load_adapter(model: Any, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """Load an adapter on a model.

    Raises ArtifactError unless every tensor of the adapter has its place in the model, and every factor in the model
    comes from the adapter. An adapter of modules that the model does not have (experts, before transformers 5 fused
    them) is left to peft, which converts it.
    """
    from peft import PeftModel, get_peft_model_state_dict

    adapter = open_adapter(folder)
    check_loadable(adapter)
    check_values(adapter)
    own = _resize(model, adapter)
    existing = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    named = set(adapter.modules) <= existing
    with as_named() if named else nullcontext(), explain_loading(folder, CONFIG), _trusting_patterns():
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    if not named:
        return adapted
    stored = set(adapter.shapes) - set(adapter.copies)
    placed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) | (stored & own)
    for names, problem in ((stored - placed, "has a tensor without a place"), (placed - stored, "lacks a tensor")):
        if names:
            raise ArtifactError(
                f"the adapter {folder} {problem} in the model: {sorted(names)[0]}: "
                "use an adapter that was trained on this model"
            )
    return adapted


def _resize(model: Any, adapter: Adapter) -> set[str]:
    """Give a model as many tokens as the embeddings of an adapter have. The names of its embeddings are returned.

    peft also saves embeddings outside `modules_to_save` if the vocabulary was resized, and loads them into the model.
    """
    try:
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # a model of images
        return set()
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    own = {key_of(f"{name}.{kind}") for name in names for kind in ("weight", "bias", "base_layer.weight")}
    rows = {adapter.shapes[key][0] for key in own & set(adapter.shapes) if len(adapter.shapes[key]) == 2}
    if layers[0] is not None and len(rows) == 1 and rows != {layers[0].weight.shape[0]}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)
    return own


def _conversion() -> Any:
    """peft's module of conversions for transformers 5; None if this peft has none."""
    try:
        from peft.utils import transformers_weight_conversion
    except ImportError:
        return None
    return transformers_weight_conversion


def _install() -> None:
    """Make peft's conversion of configurations ask whether modules are meant as they are named."""
    conversion = _conversion()
    if conversion is None or hasattr(conversion.convert_peft_config_for_transformers, "by_loftq"):
        return
    original = conversion.convert_peft_config_for_transformers

    def convert(peft_config: Any, model: nn.Module, conversions: Any) -> None:
        if not _as_named.get():
            original(peft_config, model=model, conversions=conversions)

    convert.by_loftq = True  # type: ignore[attr-defined]
    conversion.convert_peft_config_for_transformers = convert
