"""The transformers quantizer plug-in: loads folders whose `quant_method` is `loftq`.

The tensors are bitsandbytes' own, and so is the work: subclasses of `nn.Linear` that compute what `nn.Linear` does
are made plain ones before bitsandbytes' quantizer sees them. Falcon's are such a subclass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import BitsAndBytesConfig

from loftq.errors import ArtifactError
from loftq.formats.native import FORMATS, METHOD
from loftq.models.linears import computes_as_linear, converted


@register_quantization_config(METHOD)
class LoftQConfig(BitsAndBytesConfig):
    """The entry of `config.json` that `loftq.formats.native` writes, as bitsandbytes' quantizer reads it."""

    def __init__(
        self,
        format: str = FORMATS[0],  # the name in config.json
        codebook: str = "nf4",
        double_quant: bool = False,
        compute_dtype: str = "bfloat16",
        skip_modules: list[str] | None = None,
        **_: Any,
    ) -> None:
        if format not in FORMATS:
            raise ArtifactError(f"loftq format {format!r}: this loftq reads {', '.join(FORMATS)}: upgrade loftq")
        super().__init__(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
            bnb_4bit_quant_type=codebook,
            bnb_4bit_use_double_quant=double_quant,
            llm_int8_skip_modules=skip_modules,
        )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format

    def to_dict(self) -> dict[str, Any]:
        """As it was read."""
        return {
            "quant_method": METHOD,
            "format": self.format,
            "codebook": self.bnb_4bit_quant_type,
            "double_quant": self.bnb_4bit_use_double_quant,
            "compute_dtype": str(self.bnb_4bit_compute_dtype).removeprefix("torch."),
            "skip_modules": self.llm_int8_skip_modules,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: there are no defaults that a reader would know."""
        return self.to_dict()


@register_quantizer(METHOD)
class LoftQQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' 4-bit quantizer on every linear that computes as one."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:  # type: ignore[override]
        skipped = [*(self.quantization_config.llm_int8_skip_modules or ()), *(model._keep_in_fp32_modules or ())]
        for name, module in list(model.named_modules()):
            own = isinstance(module, nn.Linear) and type(module) is not nn.Linear
            if own and converted(name, skipped) and computes_as_linear(type(module)):
                with torch.device("meta"):
                    plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
                model.set_submodule(name, plain.to(module.weight.dtype))
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
