"""Trellis codes for transformers: it loads folders whose `quant_method` is `loftq-trellis`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq.core.grid import ROW, Grid
from loftq.formats.trellis_streams import METHOD, VERSION, check_config
from loftq.models.linears import DenseLinear
from loftq.models.packed_quantizer import PackedQuantizer, unskipped
from loftq.models.trellis_linears import TrellisLinear


@register_quantization_config(METHOD)
class TrellisConfig(QuantizationConfigMixin):
    """The entry of `config.json` that `loftq.formats.trellis_streams` writes."""

    def __init__(
        self,
        codebook: str = "tcq2",
        compute_dtype: str = "bfloat16",
        skip_modules: list[str] | None = None,
        codebooks: dict[str, str] | None = None,
        experts: list[str] | None = None,
        format_version: int = VERSION,
        needs_adapter: bool = False,
        **_: Any,
    ) -> None:
        check_config(format_version, [codebook, *(codebooks or {}).values()])
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.codebook = codebook
        self.codebooks = dict(codebooks or {})
        self.compute_dtype = compute_dtype
        self.skip_modules = list(skip_modules or ())
        if experts:
            self.experts = list(experts)
        if needs_adapter:
            self.needs_adapter = True

    def grid(self, module: str) -> Grid:
        """The type of the weight of a module, or of a parameter of fused experts."""
        return Grid(self.codebooks.get(module, self.codebook), ROW)


@register_quantizer(METHOD)
class TrellisHfQuantizer(PackedQuantizer):
    """Trellis codes: every linear that is not skipped."""

    quantization_config: TrellisConfig
    _linear = TrellisLinear

    def _grids(self, candidates: dict[str, DenseLinear], _names: set[str], model: Any) -> Iterator[tuple[str, Grid]]:
        return unskipped(candidates, self.quantization_config, model)
