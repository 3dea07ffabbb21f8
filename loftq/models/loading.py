"""Load an artifact for training or inference, with what stock loading leaves to the user done."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from loftq.core.grid import ROW
from loftq.display import one_line
from loftq.errors import ArtifactError, LoftQError, OptionError, UnknownNameError
from loftq.formats import gptq
from loftq.formats.adapter import CONFIG, open_adapter, target_names
from loftq.formats.artifact import MANIFEST, Artifact, open_artifact
from loftq.formats.checkpoint import dtype_of, read_checkpoint
from loftq.formats.model_config import FILE, check_beside, read_config
from loftq.models.adapters import check_adapter, check_shapes, foreign_adapter
from loftq.models.devices import is_full_memory
from loftq.models.tasks import TASKS, auto_class, recorded_task

if TYPE_CHECKING:
    from peft import PeftModel


BACKENDS = {"loftq": "our own packed linear", "gptqmodel": "gptqmodel's kernels"}


def load_qlora(
    folder: str | Path,
    adapter: str | Path | None = None,
    *,
    is_trainable: bool = True,
    device_map: Any = None,
    dtype: torch.dtype | None = None,
) -> PeftModel:
    """Load a folder that `loftq quantize` wrote, with its initial adapter or a trained one.

    Beside what `from_pretrained` does: the compute dtype is the folder's (or `dtype`), bitsandbytes' CPU
    repacking is off, norms and a task's head run in float32 while embeddings stay as they are, inputs require
    gradients so that gradient checkpointing works, and the adapter is checked to belong to this backbone.
    Raises ArtifactError.
    """
    artifact = _open(folder, "qlora")
    chosen = artifact.adapter if adapter is None else Path(adapter)
    check_adapter(artifact, chosen)
    base = load_base(artifact, is_trainable, device_map, dtype)
    return load_adapter(base, chosen, is_trainable)


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
) -> PeftModel:
    """Load a group-wise quantized model with a QA-LoRA adapter, in peft's convention (arXiv 2309.14717).

    `folder` is one that `loftq quantize --adapter qalora` wrote, with its initial adapter or a trained one, or any
    GPTQ checkpoint of a causal language model (version 1 or 2, act-order too), with a trained adapter or, without
    one, a new one of `rank`, `alpha` (default: the rank) and `pool_size` (default: the group size) that adds nothing
    yet. `backend="gptqmodel"` runs GPTQ weights by gptqmodel, where that is installed. What else is done is what
    `load_qlora` does. Raises ArtifactError and OptionError.
    """
    from peft import LoraConfig, get_peft_model

    from loftq.models.gptq_quantizer import has_gptqmodel

    if backend not in BACKENDS:
        raise UnknownNameError("backend", backend, BACKENDS)
    if backend == "gptqmodel" and not has_gptqmodel():
        raise OptionError('backend="gptqmodel": it is not installed: pip install gptqmodel optimum, or leave it out')
    ours = (Path(folder) / MANIFEST).is_file() or not gptq.is_gptq(Path(folder))
    artifact = _open(folder, "qalora") if ours else None
    chosen = Path(adapter) if adapter is not None else artifact.adapter if artifact is not None else None
    foreign = None
    if artifact is not None and chosen is not None:
        check_adapter(artifact, chosen)
    elif chosen is not None:
        foreign = foreign_adapter(chosen, str(folder), read_checkpoint(Path(folder)))
    base = load_base(artifact or Path(folder), is_trainable, device_map, dtype, backend)
    if foreign is not None:
        check_shapes(base, foreign, str(folder))
    if chosen is not None:
        return load_adapter(base, chosen, is_trainable)
    quantized = [name for name, module in base.named_modules() if hasattr(module, "qweight")]
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, rank if alpha is None else alpha),
        target_modules=target_names(quantized, [name for name, _ in base.named_modules()]),
        use_qalora=True,
        qalora_group_size=pool_size or _group_size(base),
        task_type="CAUSAL_LM",
    )
    return cast("PeftModel", get_peft_model(base, config))


def _open(folder: str | Path, kind: str) -> Artifact:
    artifact = open_artifact(folder)
    actual = artifact.manifest["kind"]
    if actual != kind:
        loader = f"load_{actual}" if actual in ("qlora", "qalora") else "from_pretrained"
        raise ArtifactError(f"{folder} is a {actual} artifact: load it with {loader}, load_{kind} reads {kind} ones")
    return artifact


def _group_size(base: Any) -> int:
    actual = int(base.config.quantization_config.group_size)
    if actual == ROW:
        raise OptionError("this checkpoint has one group a row: say how many inputs to pool with pool_size")
    return actual


def load_base(
    source: Artifact | Path,
    is_trainable: bool = False,
    device_map: Any = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Any:
    """The backbone of an artifact, or of somebody else's folder, ready to train an adapter on.

    `backend`, one of BACKENDS, says what runs GPTQ's layout: by default gptqmodel where it is installed.
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
        if dtype is not None and dtype != stored:
            _change_dtype(base, dtype)
        _norms_in_float32(base, dtype or stored)
        if is_trainable:
            base.enable_input_require_grads()
        _heads_in_float32(base, heads)
    return base


def load_adapter(base: Any, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Put the adapter in a folder on a model, by peft. Raises ArtifactError."""
    from peft import PeftModel

    with explain_loading(Path(folder), CONFIG):
        return PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)


@contextmanager
def explain_loading(folder: Path, file: str = FILE) -> Iterator[None]:
    """Turn an error of transformers or peft about the values of `file` in a folder into an ArtifactError."""
    try:
        yield
    except LoftQError:
        raise
    except Exception as error:  # the classes of configurations, models and quantizers may raise any exception
        if is_full_memory(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = one_line(error, 300)
        raise ArtifactError(
            f"{folder} cannot be loaded with its {file} ({reason}): copy or download the folder again"
        ) from error


def _config_for_our_linear(folder: Path) -> dict[str, Any]:
    """The configuration with which transformers load a folder of GPTQ by our linear, though gptqmodel is installed."""
    if not gptq.is_gptq(folder):
        return {}
    from transformers import AutoConfig

    from loftq.models.gptq_quantizer import OWN_METHOD

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {**config.quantization_config, "quant_method": OWN_METHOD}
    return {"config": config}


def guard_cpu(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    The repacking happens at the first forward in evaluation mode; dequantization, gradients and merges after
    it are wrong (bitsandbytes issue 2078).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _change_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    from loftq.models.packed_linear import PackedLinear

    scales: set[int] = set()  # are what the codes were chosen under: in another dtype they would be others
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype
        elif isinstance(module, PackedLinear):
            module.compute_dtype = dtype
            scales.update(id(buffer) for buffer in module.buffers(recurse=False))
    for tensor in [*model.parameters(), *model.buffers()]:
        kept = isinstance(tensor, Params4bit) or id(tensor) in scales
        if not kept and tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.to(dtype)


def _norms_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Norm weights in float32, with activations cast on the way in and back: the rest stays in `dtype`."""
    for module in model.modules():
        if type(module).__name__.lower().endswith("norm") and not list(module.children()):
            module.float()
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
            module.register_forward_hook(partial(_cast_output, dtype))


def _heads_in_float32(model: nn.Module, names: Iterable[str]) -> None:
    """Heads that train in full: in bfloat16 an update of a few millionths is lost."""
    for name in names:
        head = model.get_submodule(name).float()
        head.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


@contextmanager
def _expecting_a_new_head(expected: bool) -> Iterator[None]:
    """Without transformers' warning that a head begins anew, where the adapter holds it."""
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
