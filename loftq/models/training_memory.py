"""Memory of a training step besides the weights, before any weight is read: trained parameters and activations.

Activations are the tensors that autograd keeps of a batch for the backward pass. The model runs once on the meta
device, and each tensor's storage is counted when autograd keeps it. Fused attention keeps its inputs, its output and a
sum for each row. On a CPU, what is cheap to compute again is not kept. Checkpointed blocks keep their inputs; a single
block at a time keeps everything else.

`training.estimate` (the dry run of a training) and `solving.memory` (the dry run of a distillation) both count with
these functions. `planning.footprint` has a formula of its own, and says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from loftq.models.cheap_activations import keeping_less, kept_tensors
from loftq.models.first_factor import keep_inputs_once
from loftq.models.head_loss import LOGITS, HiddenStates
from loftq.models.lockstep import find_blocks
from loftq.models.second_factor import add_in_place
from loftq.models.tasks import CAUSAL

_GRADIENTS = 2  # gradients of the largest tensor that is kept, the logits: a finished one and one being computed
_HEAP = 1.5  # growth of a process relative to its live tensors: glibc is late to return blocks of changing sizes
_FLOAT32 = 4
_CHUNK_BYTES = 4 * _FLOAT32  # per logit that exists at a time: itself, its float32 copy, its softmax, its gradient


def trained_bytes(parameters: int, optimizer: str = "adamw_torch") -> int:
    """Number of bytes that trained parameters take in float32: the values, their gradients and Adam's two moments.

    The moments take float32 too, or one byte each if the name of the optimizer contains `8bit`.
    """
    moments = 2 if "8bit" in optimizer else 2 * _FLOAT32
    return parameters * (2 * _FLOAT32 + moments)


def kept_bytes(
    model: Any,
    batch: tuple[int, int],
    tasks: Sequence[str],
    device: torch.device,
    *,
    checkpointing: bool,
    products: bool = False,
) -> int:
    """Number of bytes that autograd keeps of one batch (examples, tokens), with the first gradients beside them.

    Where a few logits exist at a time (`streams_logits`), these are counted too. `model` is a peft model on the meta
    device for one of `tasks`; it will run on `device`. `products` is that of `keeping_less`. Raises RuntimeError or
    ValueError where a model's control flow depends on values, which meta tensors do not have.
    """
    asked = batch, tasks, device, checkpointing, products
    try:
        live = _live_bytes(model, *asked)
    except RuntimeError:
        if model.dtype != torch.float32:
            raise
        # On the meta device, torch computes the grouped matrix products of experts only in bfloat16.
        live = 2 * _live_bytes(model.to(torch.bfloat16), *asked)
    return int(live * (_HEAP if device.type == "cpu" else 1))


def streams_logits(model: Any, tasks: Sequence[str]) -> bool:
    """Whether the loss of a peft model on the meta device is computed without the logits of a whole batch."""
    inner = model.get_base_model()
    if not set(CAUSAL) & set(tasks) or inner.config.is_encoder_decoder:
        return False
    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    with Unpadded(), torch.no_grad():
        output = HiddenStates(inner).of(lambda: inner(input_ids=ids, attention_mask=torch.ones_like(ids)))
    return output is not None


def _live_bytes(
    model: Any, batch: tuple[int, int], tasks: Sequence[str], device: torch.device, checkpointing: bool, products: bool
) -> int:
    own = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    seen: dict[int, torch.Tensor] = {}
    sizes: Counter[str] = Counter()
    inner = model.get_base_model()
    names = [name for name, module in inner.named_modules() if hasattr(module, "lora_A")] if checkpointing else []
    blocks = {name: inner.get_submodule(name) for name in find_blocks(inner, names)}

    def keep(tensor: torch.Tensor) -> Any:
        less = tensor if pack is None or inside[-1] else pack(tensor)  # blocks that are computed again keep everything
        for part in kept_tensors(less):
            storage = _storage(part)
            if storage not in own and storage not in seen:
                seen[storage] = part  # this keeps it alive, so that no other tensor gets its address
                sizes[inside[-1]] += part.untyped_storage().nbytes()
        return less

    streamed = streams_logits(model, tasks)
    keep_inputs_once(model)
    model.train()
    if device.type == "cpu":
        add_in_place(model)
    hooks, less = torch.autograd.graph.saved_tensors_hooks(keep, _same), keeping_less(device, products=products)
    with _entering(blocks) as inside, _fused_attention(), less as pack, hooks:
        _run(inner, torch.zeros(batch, dtype=torch.int64, device="meta"), tasks, keep, streamed=streamed)
    largest = max((tensor.untyped_storage().nbytes() for tensor in seen.values()), default=0)
    inputs = len(blocks) * batch[0] * batch[1] * embedding_width(inner) * inner.dtype.itemsize
    block = max((sizes[name] for name in blocks), default=0)
    logits = min(LOGITS, batch[0] * batch[1] * inner.get_output_embeddings().out_features) if streamed else 0
    # the loss and its gradient are done before the first block is differentiated
    return int(sizes[""] + inputs + max(block + _GRADIENTS * largest, logits * _CHUNK_BYTES))


def _run(
    model: Any, ids: torch.Tensor, tasks: Sequence[str], keep: Callable[[torch.Tensor], Any], *, streamed: bool
) -> None:
    """Run one forward pass, up to the output head if its logits are `streamed`.

    The head of a classifier searches for the end of each text, which meta tensors do not have. It is therefore left
    out, and only the tensor that it reads is counted.
    """
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with Unpadded():
        if tasks == ("sequence-classification",):
            decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            keep(model.base_model(**inputs, **decoder)[0])
        elif streamed:
            HiddenStates(model).of(lambda: model(**inputs))
        else:
            model(**inputs, labels=ids)


class Unpadded(TorchFunctionMode):
    """Answers yes when a model asks whether a mask is all true, since a meta tensor has no values to tell."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch, or answer in its place."""
        return True if func is torch.Tensor.__bool__ else func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _same(kept: Any) -> Any:
    return kept


def embedding_width(model: Any) -> int:
    """The length of a token's embedding, which the model's first block gets."""
    return int(model.get_input_embeddings().weight.shape[1])


@contextmanager
def _entering(blocks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Yield a stack of the names of the blocks that are running, the innermost last."""
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
    """Keeps what fused attention keeps. On the meta device, torch would use plain attention, which keeps all scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Output (batch, heads, length, width of the values); in memory, the heads of a token lie side by side."""
        batch, heads, length, _ = query.shape
        output = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output)
        return output


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]


@contextmanager
def _fused_attention() -> Iterator[None]:
    functional: Any = nn.functional
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
