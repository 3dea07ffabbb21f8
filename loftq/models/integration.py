"""The transformers quantizer plug-in: loads folders whose `quant_method` is `loftq`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq.errors import ArtifactError
from loftq.formats.checkpoint import read_header
from loftq.formats.native import METHOD, VERSION, check_config
from loftq.models.linears import converted, find_linears, kept_in_float32
from loftq.models.packed_linear import PackedLinear


@register_quantization_config(METHOD)
class LoftQConfig(QuantizationConfigMixin):
    """The entry of `config.json` that `loftq.formats.native` writes."""

    def __init__(
        self,
        codebook: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        compute_dtype: str = "bfloat16",
        skip_modules: list[str] | None = None,
        codebooks: dict[str, str] | None = None,
        format_version: int = VERSION,
        **_: Any,
    ) -> None:
        check_config(format_version, [codebook, *(codebooks or {}).values()])
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.codebook = codebook
        self.codebooks = dict(codebooks or {})
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = compute_dtype
        self.skip_modules = list(skip_modules or ())


@register_quantizer(METHOD)
class LoftQQuantizer(HfQuantizer):
    """Puts a `PackedLinear` in the place of every linear that is not skipped, before the weights are loaded."""

    requires_calibration = False
    quantization_config: LoftQConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        skipped = [*config.skip_modules, *kept_in_float32(model)]
        for name, dense in find_linears(model).candidates.items():
            if converted(name, skipped):
                rows, columns = dense.shape
                old = model.get_submodule(name)
                packed = PackedLinear(
                    columns,
                    rows,
                    old.bias is not None,
                    codebook=config.codebooks.get(name, config.codebook),
                    block_size=config.block_size,
                    double_quant=config.double_quant,
                    dtype=old.weight.dtype,
                    device="meta",
                )
                model.set_submodule(name, packed)
        for file in checkpoint_files or () if self.pre_quantized else ():
            _check_sizes(model, Path(file))

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the tensors as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                dense: nn.Module = module.to_dense(dtype or getattr(torch, self.quantization_config.compute_dtype))
                model.set_submodule(name, dense)
        return model


def _check_sizes(model: nn.Module, file: Path) -> None:
    """Raise ArtifactError for a packed tensor that is not what config.json makes of it: transformers would only say
    that something does not match.
    """
    expected = {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for key, tensor in module.state_dict().items()
        if key != "bias"
    }
    for spec in read_header(file):
        wanted = expected.get(spec.name)
        if wanted is not None and (spec.shape, spec.dtype) != (tuple(wanted.shape), wanted.dtype):
            raise ArtifactError(
                f"{file}: {spec.name} is {spec.dtype} {list(spec.shape)}, expected {wanted.dtype} "
                f"{list(wanted.shape)}: the folder is damaged, or its config.json is another's"
            )
