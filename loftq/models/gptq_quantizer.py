"""Loads folders in GPTQ's layout with our linear, whichever program wrote them.

If gptqmodel is installed, transformers loads GPTQ folders with it, and our quantizer is selected by its own name,
`OWN_METHOD`. The tables of transformers are changed only once, when this module is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.import_utils import is_gptqmodel_available, is_optimum_available
from transformers.utils.quantization_config import GPTQConfig, QuantizationMethod

from loftq.core.grid import Grid
from loftq.formats import gptq
from loftq.models.gptq_linear import GptqLinear
from loftq.models.linears import DenseLinear
from loftq.models.packed_quantizer import PackedQuantizer

OWN_METHOD = "gptq_by_loftq"  # the `quant_method` during loading; saved folders say "gptq"


@register_quantization_config(OWN_METHOD)
class GptqConfig(GPTQConfig):
    """transformers' configuration of GPTQ, but it does not require optimum, and records which quantizer is selected."""

    def __init__(self, *arguments: Any, quant_method: str = gptq.METHOD, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if quant_method == OWN_METHOD:
            self.quant_method = OWN_METHOD  # type: ignore[assignment]

    def post_init(self) -> None:
        """Do what transformers does, but skip its check of optimum's version, which it makes if modules are named."""
        named, self.modules_in_block_to_quantize = self.modules_in_block_to_quantize, None
        super().post_init()  # type: ignore[no-untyped-call]
        self.modules_in_block_to_quantize = named


@register_quantizer(OWN_METHOD)
class GptqQuantizer(PackedQuantizer):
    """Replaces the linears whose codes are in the checkpoint."""

    quantization_config: GptqConfig
    _linear = GptqLinear

    def __init__(self, quantization_config: GptqConfig, **named: Any) -> None:
        quantization_config.quant_method = (
            QuantizationMethod.GPTQ
        )  # it has been selected; from here on the method is GPTQ
        super().__init__(quantization_config, **named)

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Raise ImportError for a format that only gptqmodel can read."""
        if self.quantization_config.format not in gptq.READABLE:
            raise ImportError(
                f"GPTQ's format {self.quantization_config.format!r} can only be read by gptqmodel: "
                "pip install gptqmodel optimum"
            )

    def _grids(self, candidates: dict[str, DenseLinear], names: set[str], _model: Any) -> Iterator[tuple[str, Grid]]:
        config = self.quantization_config
        grid = gptq.grid_of(config.bits, config.group_size, config.sym)
        return ((name, grid) for name in candidates if f"{name}.qweight" in names)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        for module in model.modules():
            if isinstance(module, GptqLinear):
                module.less = gptq.READABLE[self.quantization_config.format]
                module.ordered = gptq.is_ordered(module.g_idx, module.grid.block(module.in_features))
        return super()._process_model_after_weight_loading(model, **options)


def has_gptqmodel() -> bool:
    """Whether stock transformers can load GPTQ folders here."""
    return bool(is_gptqmodel_available() and is_optimum_available())


if not has_gptqmodel():  # gptqmodel has kernels for GPUs, so it comes first
    AUTO_QUANTIZATION_CONFIG_MAPPING[gptq.METHOD] = GptqConfig
    AUTO_QUANTIZER_MAPPING[gptq.METHOD] = GptqQuantizer
