"""Our own `quant_method`, for what stock loaders cannot take: another format's tensors, and a loader of ours.

`config.json` says `"quant_method": "loftq"`, which transformers knows once loftq is imported, and `"format"`, which
is the layout of the tensors. There is one so far: bitsandbytes' 4 bits, on linears that stock transformers would
not convert. A stock load of such a folder fails at the first packed weight, whose shape is not the model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loftq.core.blockwise import BlockQuantizer

METHOD = "loftq"
FORMATS = ("bitsandbytes",)


def quantization_config(
    quantizer: BlockQuantizer, compute_dtype: torch.dtype, skip_modules: Sequence[str]
) -> dict[str, object]:
    """The entry of `config.json`."""
    return {
        "quant_method": METHOD,
        "format": FORMATS[0],
        "codebook": quantizer.codebook,
        "double_quant": quantizer.double_quant,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "skip_modules": list(skip_modules),
    }
