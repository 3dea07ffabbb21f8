"""Asks transformers whether a model with quantized linears can be loaded and run, by a trial on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from loftq.models.linears import find_linears
from loftq.models.training_memory import Unpadded

_TOKENS = 8
_SAMPLES, _FRAMES = 16_000, 64  # a second of sound


def keeps_modules(model: nn.Module, method: str) -> bool:
    """Whether transformers' loader of a quantization method keeps the modules of a model.

    For some methods, it replaces the fused experts of some models by one module for each expert. It then does not find
    the tensors of the experts in the checkpoint.
    """
    from transformers.quantizers import base

    patched = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    if not any(type(module).__name__ in patched for module in model.modules()):
        return True
    tried = deepcopy(model)
    quantizer = cast(Any, SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method)))
    base.HfQuantizer._convert_model_for_quantization(quantizer, tried)  # type: ignore[no-untyped-call]
    return {name for name, _ in tried.named_parameters()} == {name for name, _ in model.named_parameters()}


def runs_packed(model: nn.Module, targets: Iterable[str]) -> bool:
    """Whether the code of a model runs with packed linears in place of `targets`.

    Some models read or change the weight of a linear directly. The result is also true if the model cannot be tried,
    because its inputs are unknown, or because its code depends on values, which the meta device does not have.
    """
    if not _runs(deepcopy(model)):
        return True
    return _try_packed(model, targets)[0]  # another copy, because a forward pass may change the state of a model


def unpackable(model: nn.Module, targets: Iterable[str]) -> dict[str, str]:
    """The targets that must stay dense for the code of a model, each with the reason.

    T5 and its relatives cast the inputs of a linear to the dtype of its weight, which is that of packed codes. Some
    state space models multiply with the weight of a linear that they never call. The result is empty if the model
    cannot be tried.
    """
    runs, packed = _try_packed(model, targets)
    found = {name: "the code casts inputs to their dtype" for name, module in packed.items() if module.got_codes}
    if runs:
        return found
    called: set[str] = set()
    tried = deepcopy(model)
    for name in packed:
        tried.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
    unused = packed.keys() - called if _runs(tried) else set()
    if unused and _try_packed(model, packed.keys() - unused - found.keys())[0]:
        found |= {name: "the code uses their weights directly" for name in packed if name in unused}
    return found


def _try_packed(model: nn.Module, targets: Iterable[str]) -> tuple[bool, dict[str, _Packed]]:
    """Whether a model runs with packed linears in place of `targets`, and these linears."""
    tried = deepcopy(model)
    shapes = {name: dense.shape for name, dense in find_linears(tried).candidates.items()}
    packed = {name: _Packed(*shapes[name]) for name in targets}
    for name, module in packed.items():
        tried.set_submodule(name, module)
    return _runs(tried), packed


class _Packed(nn.Linear):
    """A stand-in for a linear (out, in) with packed codes: on the meta device, only the shape of the output matters."""

    def __init__(self, rows: int, columns: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = columns, rows
        self.weight = nn.Parameter(torch.zeros(rows * columns // 2, dtype=torch.uint8, device="meta"), False)
        self.register_parameter("bias", None)
        self.got_codes = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return a tensor with the shape of the output."""
        self.got_codes |= not input.is_floating_point()
        dtype = torch.float32 if self.got_codes else input.dtype
        return input.new_empty((*input.shape[:-1], self.out_features), dtype=dtype)


@torch.no_grad()
def _runs(model: Any) -> bool:
    try:
        with Unpadded():
            model.eval()(**_inputs(model))
    except Exception:  # the code of a model may raise anything
        return False
    return True


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    """Inputs of a model of text, images or sound, for a trial on the meta device."""
    config, kind = model.config, getattr(model, "main_input_name", "input_ids")
    ids = torch.zeros((1, _TOKENS), dtype=torch.int64, device="meta")
    shape: tuple[int, ...] = ()
    if kind == "pixel_values":
        part = getattr(config, "vision_config", config)
        side = part.image_size
        shape = (1, part.num_channels, *(side if isinstance(side, (list, tuple)) else (side, side)))
    elif kind == "input_values":
        shape = (1, _SAMPLES)
    elif kind == "input_features" and hasattr(config, "max_source_positions"):
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)  # Whisper's
    elif kind == "input_features":
        shape = (1, _FRAMES, getattr(config, "feature_projection_input_dim", None) or config.num_mel_bins)
    inputs = {kind: torch.zeros(shape, dtype=model.dtype, device="meta") if shape else ids}
    return {**inputs, "decoder_input_ids": ids} if config.is_encoder_decoder else inputs
