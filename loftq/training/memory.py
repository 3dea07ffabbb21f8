"""What a training will need, before any weight is read.

The model is built on the meta device, with its adapter, and run once on a batch of the longest examples: what autograd
keeps for the backward pass is counted as it is kept, storage by storage. Fused attention keeps its inputs, its output
and a sum a row; checkpointed blocks keep their inputs, and one block at a time the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode

from loftq.errors import OptionError
from loftq.formats.adapter import open_adapter
from loftq.formats.artifact import Artifact
from loftq.models.lockstep import find_blocks
from loftq.models.tasks import build_meta
from loftq.pipeline.plan import make_plan
from loftq.pipeline.recipe import Recipe
from loftq.training.opening import check_artifact, compute_dtype, device_of, find_model, lora_config, quantizing_of
from loftq.training.settings import Settings, settings_of
from loftq.training.tasks import TASKS

_GRADIENTS = 2  # of the largest tensor that is kept, the logits: theirs, and one on its way


@dataclass(frozen=True)
class Estimate:
    """Bytes, above the program itself, on one device."""

    model: str
    trainable: int
    total: int
    batch: tuple[int, int]  # examples, tokens
    weights: int
    adapter: int  # with its gradients and what the optimizer keeps
    activations: int

    @property
    def memory(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.activations

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "batch": list(self.batch), "memory": self.memory}

    def table(self) -> str:
        """The figures, for a person."""
        share = 100 * self.trainable / self.total
        rows, tokens = self.batch
        lines = [
            f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)",
            f"{self.weights / 1e9:8.2f} GB  weights",
            f"{self.adapter / 1e9:8.2f} GB  adapter, its gradients, the optimizer",
            f"{self.activations / 1e9:8.2f} GB  activations of {rows} examples of {tokens} tokens",
            f"{self.memory / 1e9:8.2f} GB  together, on each device, beside the program",
            "Lower --batch-size or --cutoff-len, or add --gradient-checkpointing, for less.",
        ]
        return "\n".join(lines)


def estimate(model: str | None = None, **settings: Any) -> Estimate:
    """What `train` needs with these settings. Nothing is written, and of weights headers alone are read."""
    asked = settings_of({"model": model, **settings})
    device = device_of(asked.cpu)
    dtype = compute_dtype(asked.dtype, device)
    adapted, trainable, weights = _on_meta(asked, dtype)
    total = trainable + sum(p.numel() for p in adapted.parameters() if not p.requires_grad)
    limits = [asked.cutoff_len, getattr(adapted.config.get_text_config(), "max_position_embeddings", None)]
    batch = asked.batch_size, min(limit for limit in limits if limit)
    optimizer = asked.optim or ("paged_adamw_8bit" if device.type == "cuda" else "adamw_torch")
    state = 2 if "8bit" in optimizer else 8
    kept = _kept(adapted, batch, TASKS[asked.task].models, checkpointing=asked.gradient_checkpointing)
    return Estimate(asked.model, trainable, total, batch, weights, trainable * (8 + state), kept)


def _on_meta(settings: Settings, dtype: torch.dtype) -> tuple[Any, int, int]:
    """The model with its adapter, without memory; how many parameters train; and how many bytes the others take."""
    found = find_model(settings.model)
    if isinstance(found, Path):
        raise OptionError(
            f"--dry-run: {found} is a GPTQ checkpoint that loftq did not write: its size is that of its files"
        )
    if isinstance(found, Artifact):
        check_artifact(settings, found)
        recipe, adapter = found.manifest["recipe"], open_adapter(found.adapter)
        task = found.manifest["source"]["task"]
        model, _ = build_meta(found.folder, task=task, num_labels=recipe["num_labels"], dtype=dtype)
        config = LoraConfig.from_pretrained(found.adapter)
        trainable = sum(math.prod(shape) for shape in adapter.shapes.values())
        weights = int(found.manifest["totals"]["backbone_bytes"])
    else:
        plan = make_plan(found, Recipe(**quantizing_of(settings, found)))
        model, _ = build_meta(found.folder, task=plan.task.name, num_labels=plan.recipe.num_labels, dtype=dtype)
        config = lora_config(plan)
        trainable = sum(math.prod(spec.shape) for _, spec in plan.adapter.offsets.values())
        weights = plan.backbone_bytes
        if settings.adapter == "lora":
            weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    config.inference_mode = False
    config.use_qalora = False  # which needs a quantized linear; what is kept for it is less
    with torch.device("meta"):
        return get_peft_model(model, config), trainable, weights


def _kept(model: Any, batch: tuple[int, int], able: Sequence[str], *, checkpointing: bool) -> int:
    """Bytes that autograd keeps of one batch, and of the gradients that first meet them."""
    own = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    seen: dict[int, torch.Tensor] = {}
    sizes: Counter[str] = Counter()
    inner = model.get_base_model()
    names = [name for name, module in inner.named_modules() if hasattr(module, "lora_A")] if checkpointing else []
    blocks = {name: inner.get_submodule(name) for name in find_blocks(inner, names)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in own and seen.setdefault(_storage(tensor), tensor) is tensor:
            sizes[inside[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with _entering(blocks) as inside, _fused_attention(), torch.autograd.graph.saved_tensors_hooks(keep, _same):
        _run(inner, torch.zeros(batch, dtype=torch.int64, device="meta"), able, keep)
    largest = max((tensor.untyped_storage().nbytes() for tensor in seen.values()), default=0)
    inputs = len(blocks) * batch[0] * batch[1] * _width(inner) * inner.dtype.itemsize
    block = max((sizes[name] for name in blocks), default=0)
    return int(sizes[""] + inputs + block + _GRADIENTS * largest)


def _run(model: Any, ids: torch.Tensor, able: Sequence[str], keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """One forward pass. A classifier's head looks for where a text ends, and is left out: it keeps what it reads.

    Raises OptionError for a model whose way depends on values, of which meta tensors have none.
    """
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with _Unpadded():
            if able == ("sequence-classification",):
                decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
                keep(model.base_model(**inputs, **decoder)[0])
            else:
                model(**inputs, labels=ids)
    except (RuntimeError, ValueError) as error:  # NotImplementedError is the former
        reason = " ".join(str(error).split())[:200]
        raise OptionError(
            f"--dry-run: {type(model).__name__} does not run in {model.dtype} without its weights ({reason}): try "
            "another --dtype, or a training of one step"
        ) from error


class _Unpadded(TorchFunctionMode):
    """Says yes where a model asks whether a mask is all true, which a meta tensor cannot tell."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for each function of torch."""
        return True if func is torch.Tensor.__bool__ else func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _width(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


@contextmanager
def _entering(blocks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """A stack of the blocks that run, its last one the innermost."""
    inside = [""]
    handles = []
    for name, block in blocks.items():
        handles.append(block.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(block.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        yield inside
    finally:
        for handle in handles:
            handle.remove()


class _Attention(torch.autograd.Function):
    """What fused attention keeps: on the meta device torch would take the plain one, which keeps every score."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(batch, heads, length, width) of the values."""
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output)
        return output


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]


@contextmanager
def _fused_attention() -> Iterator[None]:
    functional: Any = nn.functional
    kept = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = kept
