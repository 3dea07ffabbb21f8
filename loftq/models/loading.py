"""Loads an artifact for training or inference, and handles the setup that stock loading leaves to you."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loftq.chatter import silenced
from loftq.errors import ArtifactError, OptionError, UnknownNameError
from loftq.formats import gptq
from loftq.formats.adapter import open_adapter
from loftq.formats.artifact import MANIFEST, Artifact, open_artifact, refuse_start
from loftq.formats.checkpoint import dtype_of, read_checkpoint
from loftq.formats.model_config import FILE, check_beside, read_config
from loftq.hub.folder import fetch_adapter, fetch_folder
from loftq.models.adapters import check_adapter, check_shapes, foreign_adapter
from loftq.models.choices import OFFLOADS
from loftq.models.input_gradients import require_input_gradients
from loftq.models.peft_targets import load_adapter
from loftq.models.refusals import explain_loading
from loftq.models.tasks import TASKS, auto_class, recorded_task

if TYPE_CHECKING:
    from peft import PeftModel


BACKENDS = {"loftq": "our own packed linear", "gptqmodel": "gptqmodel's kernels"}


@silenced()
def load_qlora(
    folder: str | Path,
    adapter: str | Path | None = None,
    *,
    is_trainable: bool = True,
    device_map: Any = None,
    dtype: torch.dtype | None = None,
    offload: str | None = None,
) -> PeftModel:
    """Load a folder that `loftq quantize` wrote, with its initial adapter or a trained one.

    Both are folders, or on the Hub `OWNER/NAME` or `OWNER/NAME@REVISION`; the adapter may be `OWNER/NAME/FOLDER` too.
    In addition to `from_pretrained`, it sets the compute dtype of the folder (or `dtype`), turns off bitsandbytes'
    repacking of weights on CPUs, runs norms and the head of a task in float32 without changing the embeddings, makes
    inputs require gradients so that gradient checkpointing works, and checks that the adapter belongs to the backbone.
    With `offload="experts"`, the quantized experts of a mixture stay in main memory, and are copied to the device a few
    at a time; `device_map` is then a single device. Raises ArtifactError, and OptionError for an `offload` that the
    model cannot have.
    """

    artifact = _open(folder, "qlora")
    chosen = artifact.adapter if adapter is None else fetch_adapter(adapter)
    check_adapter(artifact, chosen)
    if offload is None:
        return load_adapter(load_base(artifact, is_trainable, device_map, dtype), chosen, is_trainable=is_trainable)
    return _load_offloaded(artifact, chosen, is_trainable, device_map, dtype, offload)


def _load_offloaded(
    artifact: Artifact, adapter: Path, is_trainable: bool, device_map: Any, dtype: torch.dtype | None, offload: str
) -> PeftModel:
    """Load into main memory, and move everything but the experts to the device."""
    from loftq.models.expert_offload import MAIN_MEMORY, offload_experts, one_device, refusal

    if offload not in OFFLOADS:
        raise UnknownNameError("offload", offload, OFFLOADS)
    device = one_device(device_map)
    if not any(len(row["shape"]) == 3 for row in artifact.manifest["layers"]):
        raise OptionError(refusal(str(artifact.folder)))
    base = load_base(artifact, is_trainable, {"": MAIN_MEMORY}, dtype)
    offload_experts(base, device)
    model = load_adapter(base, adapter, is_trainable=is_trainable)
    nn.Module.to(model, device)  # peft has put the factors of experts where the experts are
    return model


@silenced()
def load_qalora(
    folder: str | Path,
    adapter: str | Path | None = None,
    *,
    is_trainable: bool = True,
    device_map: Any = None,
    dtype: torch.dtype | None = None,
    backend: str = "loftq",
    rank: int = 16,
    alpha: float | None = None,
    pool_size: int | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
) -> PeftModel:
    """Load a group-wise quantized model with a QA-LoRA adapter, in peft's convention (arXiv 2309.14717).

    `folder` is either one that `loftq quantize --adapter qalora` wrote, with its initial adapter or a trained one, or
    any GPTQ checkpoint of a causal language model (version 1 or 2, with or without act-order); both it and `adapter`
    are named as for `load_qlora`. Without `adapter`, such a checkpoint gets a new adapter of `rank`, `alpha` (default:
    the rank), `pool_size` (default: the group size) and `dropout` on `target_modules` (ends of names; default: all
    quantized linears), which adds nothing yet. With `backend="gptqmodel"`, gptqmodel
    runs GPTQ weights, if it is installed. The rest of the setup is that of `load_qlora`. Raises ArtifactError,
    SourceError and OptionError.
    """
    from loftq.models.foreign_gptq import new_qalora
    from loftq.models.gptq_quantizer import has_gptqmodel

    if backend not in BACKENDS:
        raise UnknownNameError("backend", backend, BACKENDS)
    if backend == "gptqmodel" and not has_gptqmodel():
        raise OptionError(
            'backend="gptqmodel": gptqmodel is not installed: run `pip install gptqmodel optimum`, '
            "or leave the argument out"
        )
    folder = fetch_folder(folder)
    ours = (folder / MANIFEST).is_file() or not gptq.is_gptq(folder)
    artifact = _open(folder, "qalora") if ours else None
    chosen = fetch_adapter(adapter) if adapter is not None else artifact.adapter if artifact is not None else None
    foreign = None
    if artifact is not None and chosen is not None:
        check_adapter(artifact, chosen)
    elif chosen is not None:
        foreign = foreign_adapter(chosen, str(folder), read_checkpoint(folder), quantized=True)
    base = load_base(artifact or folder, is_trainable, device_map, dtype, backend)
    if foreign is not None:
        check_shapes(base, foreign, str(folder))
    if chosen is not None:
        return load_adapter(base, chosen, is_trainable=is_trainable)
    return new_qalora(base, folder, rank, rank if alpha is None else alpha, pool_size, dropout, target_modules)


def _open(folder: str | Path, kind: str) -> Artifact:
    artifact = open_artifact(fetch_folder(folder))
    refuse_start(artifact)
    actual = artifact.manifest["kind"]
    if actual != kind:
        loader = f"load_{actual}" if actual in ("qlora", "qalora") else "from_pretrained"
        raise ArtifactError(f"{folder} is a {actual} artifact: load it with {loader}, load_{kind} reads {kind} ones")
    return artifact


def load_base(
    source: Artifact | Path,
    is_trainable: bool = False,
    device_map: Any = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Any:
    """Load the backbone of an artifact, or a folder of another program, ready for training an adapter on it.

    `backend`, one of BACKENDS, runs weights in GPTQ's layout; by default it is gptqmodel if that is installed.
    """
    if isinstance(source, Path):
        folder, task, heads = source, TASKS["causal-lm"], ()
        stored = dtype_of(read_config(folder, ArtifactError))
    else:
        folder, task = source.folder, recorded_task(source.manifest, source.folder / MANIFEST)
        read_config(folder, ArtifactError)
        check_beside(folder, ArtifactError)
        heads = open_adapter(source.adapter).config.get("modules_to_save") or ()
        stored = getattr(torch, source.manifest["recipe"]["compute_dtype"])
    with explain_loading(folder), _expecting_a_new_head(task.has_head):
        config = _config_for_our_linear(folder) if backend == "loftq" else {}
        base: Any = auto_class(task).from_pretrained(folder, dtype=stored, device_map=device_map, **config)
        guard_cpu(base)
        _require_quantized(base, folder)
        if dtype is not None and dtype != stored:
            _change_dtype(base, dtype)
        _norms_in_float32(base, dtype or stored)
        if is_trainable:
            require_input_gradients(base)
        _heads_in_float32(base, heads)
    return base


def _config_for_our_linear(folder: Path) -> dict[str, Any]:
    """The arguments with which transformers loads a GPTQ folder with our linear, even if gptqmodel is installed."""
    if not gptq.is_gptq(folder):
        return {}
    from transformers import AutoConfig

    from loftq.models.gptq_quantizer import OWN_METHOD

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {**config.quantization_config, "quant_method": OWN_METHOD}
    return {"config": config}


def guard_cpu(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    It repacks them in the first forward pass in evaluation mode. Dequantization, gradients and merges are wrong after
    that (bitsandbytes issue 2078).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _require_quantized(model: nn.Module, folder: Path) -> None:
    """Raise ArtifactError for a linear that bitsandbytes would run, but whose stored weight is not quantized.

    This happens if the list of modules that stay dense in `config.json` lacks one of them.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, module in model.named_modules():
        dense4 = isinstance(module, Linear4bit) and getattr(module.weight, "quant_state", None) is None
        dense8 = isinstance(module, Linear8bitLt) and module.weight.dtype != torch.int8
        if dense4 or dense8:
            raise ArtifactError(
                f"{folder / FILE}: {name} is dense in the folder's weights, but llm_int8_skip_modules does not list "
                "it: copy or download the folder again"
            )


def _change_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    from loftq.models.packed_experts import PackedExperts
    from loftq.models.packed_linear import PackedLinear

    scales: set[int] = set()  # they keep their dtype: the codes were chosen for exactly these scales
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype
        elif isinstance(module, PackedLinear):
            module.compute_dtype = dtype
            scales.update(id(buffer) for buffer in module.buffers(recurse=False))
        elif isinstance(module, PackedExperts):
            module.change_dtype(dtype)
            scales.update(id(buffer) for buffer in module.buffers(recurse=False))
    for tensor in [*model.parameters(), *model.buffers()]:
        kept = isinstance(tensor, Params4bit) or id(tensor) in scales
        if not kept and tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.to(dtype)


def _norms_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Run norms in float32: their inputs are cast to float32, and their outputs back to `dtype`."""
    for module in model.modules():
        if type(module).__name__.lower().endswith("norm") and not list(module.children()):
            module.float()
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
            module.register_forward_hook(partial(_cast_output, dtype))


def _heads_in_float32(model: nn.Module, names: Iterable[str]) -> None:
    """Keep heads, which train in full, in float32: in bfloat16, small updates would be lost."""
    for name in names:
        head = model.get_submodule(name).float()
        head.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


@contextmanager
def _expecting_a_new_head(expected: bool) -> Iterator[None]:
    """Hide transformers' warning about a newly initialized head if the adapter contains it."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    try:
        if expected:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level)


def _cast_inputs(
    _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(cast(value) for value in inputs), {name: cast(value) for name, value in named.items()}


def _cast_output(
    dtype: torch.dtype, _module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor
) -> torch.Tensor:
    return output.to(dtype)
