"""The transformers quantizer plug-in: loads folders whose `quant_method` is `loftq`, and, where gptqmodel is not
installed, GPTQ folders too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.import_utils import is_gptqmodel_available, is_optimum_available
from transformers.utils.quantization_config import GPTQConfig, QuantizationConfigMixin

from loftq.core.grid import Grid
from loftq.errors import ArtifactError
from loftq.formats import gptq
from loftq.formats.checkpoint import read_header
from loftq.formats.native import METHOD, VERSION, check_config
from loftq.models.linears import Dense, converted, find_linears, kept_in_float32
from loftq.models.packed_linear import GptqLinear, PackedLinear


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
        zero_point: str | None = None,
        format_version: int = VERSION,
        **_: Any,
    ) -> None:
        check_config(format_version, [codebook, *(codebooks or {}).values()], zero_point)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.codebook = codebook
        self.codebooks = dict(codebooks or {})
        self.block_size = block_size
        self.zero_point = zero_point
        self.double_quant = double_quant
        self.compute_dtype = compute_dtype
        self.skip_modules = list(skip_modules or ())

    def grid(self, module: str) -> Grid:
        """The type of a module's weight."""
        return Grid(self.codebooks.get(module, self.codebook), self.block_size, self.double_quant, self.zero_point)


class _PackedQuantizer(HfQuantizer):
    """Puts packed linears in the place of a model's own before the weights are loaded."""

    requires_calibration = False
    _linear: type[PackedLinear] = PackedLinear

    def _grids(self, model: Any, candidates: dict[str, Dense]) -> Iterator[tuple[str, Grid]]:
        """The linears to replace, with the types of their weights."""
        raise NotImplementedError

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        candidates = dict(find_linears(model).candidates)
        for name, grid in self._grids(model, candidates):
            rows, columns = candidates[name].shape
            old = model.get_submodule(name)
            packed = self._linear(columns, rows, old.bias is not None, grid=grid, dtype=old.weight.dtype, device="meta")
            model.set_submodule(name, packed)
        for file in checkpoint_files or () if self.pre_quantized else ():
            _check_sizes(model, Path(file))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.quantization_method = METHOD  # whatever the layout: peft refuses to merge where this says "gptq"
        return model

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
                model.set_submodule(name, cast(nn.Module, module.to_dense(dtype)))
        return model


@register_quantizer(METHOD)
class LoftQQuantizer(_PackedQuantizer):
    """Our own layout: every linear that is not skipped."""

    quantization_config: LoftQConfig

    def _grids(self, model: Any, candidates: dict[str, Dense]) -> Iterator[tuple[str, Grid]]:
        config = self.quantization_config
        skipped = [*config.skip_modules, *kept_in_float32(model)]
        return ((name, config.grid(name)) for name in candidates if converted(name, skipped))


class GptqConfig(GPTQConfig):
    """transformers' own, which does not need optimum to be read."""

    def post_init(self) -> None:
        """As transformers', but for its question which optimum is installed, asked where modules are named."""
        named, self.modules_in_block_to_quantize = self.modules_in_block_to_quantize, None
        super().post_init()  # type: ignore[no-untyped-call]
        self.modules_in_block_to_quantize = named


class GptqQuantizer(_PackedQuantizer):
    """GPTQ's layout, version 2, as loftq writes it: the linears that the config names."""

    quantization_config: GptqConfig
    _linear = GptqLinear

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Raise ImportError for what gptqmodel alone can read."""
        config = self.quantization_config
        if config.format != gptq.CHECKPOINT_FORMAT or config.desc_act or not config.modules_in_block_to_quantize:
            raise ImportError(
                "GPTQ folders that loftq did not write are read by gptqmodel: pip install gptqmodel optimum"
            )

    def _grids(self, _model: Any, candidates: dict[str, Dense]) -> Iterator[tuple[str, Grid]]:
        config = self.quantization_config
        zero_point = "symmetric" if config.sym else "integer"
        ends = tuple(name for names in config.modules_in_block_to_quantize or () for name in names)
        grid = Grid(f"int{config.bits}", config.group_size, zero_point=zero_point)
        within = config.block_name_to_quantize or ""
        return ((name, grid) for name in candidates if name.startswith(within) and name.endswith(ends))


if not (is_gptqmodel_available() and is_optimum_available()):  # where it is, with its kernels, it is the better one
    AUTO_QUANTIZATION_CONFIG_MAPPING[gptq.METHOD] = GptqConfig
    AUTO_QUANTIZER_MAPPING[gptq.METHOD] = GptqQuantizer


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
