"""The transformers quantizer plug-in: loads folders whose `quant_method` is `loftq`, and, where gptqmodel is not
installed, GPTQ folders too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
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
from loftq.formats.checkpoint import TensorSpec, read_header
from loftq.formats.native import METHOD, VERSION, check_config
from loftq.models.devices import find_gpu
from loftq.models.gptq_linear import GptqLinear
from loftq.models.linears import DenseLinear, converted, find_linears, kept_in_float32
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

    @abstractmethod
    def _grids(self, candidates: dict[str, DenseLinear], names: set[str], model: Any) -> Iterator[tuple[str, Grid]]:
        """The linears to replace, with the types of their weights. `names` are those of the checkpoint's tensors."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        candidates = dict(find_linears(model).candidates)
        files = [Path(file) for file in (checkpoint_files or () if self.pre_quantized else ())]
        headers = {file: read_header(file) for file in files}
        names = {spec.name for specs in headers.values() for spec in specs}
        for name, grid in self._grids(candidates, names, model):
            rows, columns = candidates[name].shape
            old = model.get_submodule(name)
            packed = self._linear(columns, rows, old.bias is not None, grid=grid, dtype=old.weight.dtype, device="meta")
            model.set_submodule(name, packed)
        for file, specs in headers.items():
            _check_sizes(model, file, specs)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.quantization_method = METHOD  # whatever the layout: peft refuses to merge where this says "gptq"
        return model

    def update_device_map(self, device_map: Any) -> Any:
        """As transformers has it for bitsandbytes' folders: unless it is said where, a model goes to the GPU."""
        gpu = find_gpu()
        return device_map if gpu is None or device_map is not None else {"": gpu}

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

    def _grids(self, candidates: dict[str, DenseLinear], _names: set[str], model: Any) -> Iterator[tuple[str, Grid]]:
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
    """GPTQ's layout, whoever wrote it: the linears whose codes the checkpoint has."""

    quantization_config: GptqConfig
    _linear = GptqLinear

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Raise ImportError for what gptqmodel alone can read."""
        if self.quantization_config.format not in gptq.READABLE:
            raise ImportError(
                f"GPTQ's format {self.quantization_config.format!r} is read by gptqmodel alone: "
                "pip install gptqmodel optimum"
            )

    def _grids(self, candidates: dict[str, DenseLinear], names: set[str], _model: Any) -> Iterator[tuple[str, Grid]]:
        config = self.quantization_config
        zero_point = "symmetric" if config.sym else "integer"
        grid = Grid(f"int{config.bits}", config.group_size, zero_point=zero_point)
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


_STOCK_GPTQ = (AUTO_QUANTIZATION_CONFIG_MAPPING[gptq.METHOD], AUTO_QUANTIZER_MAPPING[gptq.METHOD])


def read_gptq_by(ours: bool) -> None:
    """Have transformers load GPTQ folders with our linear, or with gptqmodel's."""
    found = (GptqConfig, GptqQuantizer) if ours else _STOCK_GPTQ
    AUTO_QUANTIZATION_CONFIG_MAPPING[gptq.METHOD], AUTO_QUANTIZER_MAPPING[gptq.METHOD] = found


read_gptq_by(ours=not has_gptqmodel())  # which has kernels for GPUs


def _check_sizes(model: nn.Module, file: Path, specs: Sequence[TensorSpec]) -> None:
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
    for spec in specs:
        wanted = expected.get(spec.name)
        if wanted is not None and (spec.shape, spec.dtype) != (tuple(wanted.shape), wanted.dtype):
            raise ArtifactError(
                f"{file}: {spec.name} is {spec.dtype} {list(spec.shape)}, expected {wanted.dtype} "
                f"{list(wanted.shape)}: the folder is damaged, or its config.json is another's"
            )
