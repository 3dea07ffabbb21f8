"""Memory of a training step beside the weights, before any weight is read: trained parameters and activations.

Activations are what autograd keeps of a batch for the backward pass. The model is on the meta device and runs once:
what is kept is counted as it is kept, storage by storage. Fused attention keeps its inputs, its output and a sum a row;
checkpointed blocks keep their inputs, and one block at a time the rest.

`training.estimate` (the dry run of a training) and `solving.memory` (that of a distillation) both count with these
functions. `planning.footprint` has a formula of its own, and says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from loftq.models.lockstep import find_blocks

_GRADIENTS = 2  # of the largest tensor that is kept, the logits: theirs, and one on its way
_HEAP = 1.5  # what a process grows by, over what lives in it: glibc gives blocks of changing sizes back late
_FLOAT32 = 4


def trained_bytes(parameters: int, optimizer: str = "adamw_torch") -> int:
    """Bytes of trained parameters, in float32: themselves, their gradients, and Adam's two moments.

    The moments are in float32 too, or in a byte each where the optimizer's name has `8bit` in it.
    """
    moments = 2 if "8bit" in optimizer else 2 * _FLOAT32
    return parameters * (2 * _FLOAT32 + moments)


def kept_bytes(
    model: Any, batch: tuple[int, int], able: Sequence[str], device: torch.device, *, checkpointing: bool
) -> int:
    """Bytes that autograd keeps of one batch (examples, tokens), and of the gradients that first meet them.

    `model` is peft's, on the meta device, for the tasks `able`; it is to run on `device`. Raises RuntimeError or
    ValueError where a model's way depends on values, of which meta tensors have none.
    """
    try:
        live = _live_bytes(model, batch, able, checkpointing)
    except RuntimeError:
        if model.dtype != torch.float32:
            raise
        # torch's grouped products, of experts, know the meta device in bfloat16 alone.
        live = 2 * _live_bytes(model.to(torch.bfloat16), batch, able, checkpointing)
    return int(live * (_HEAP if device.type == "cpu" else 1))


def _live_bytes(model: Any, batch: tuple[int, int], able: Sequence[str], checkpointing: bool) -> int:
    own = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    seen: dict[int, torch.Tensor] = {}
    sizes: Counter[str] = Counter()
    inner = model.get_base_model()
    names = [name for name, module in inner.named_modules() if hasattr(module, "lora_A")] if checkpointing else []
    blocks = {name: inner.get_submodule(name) for name in find_blocks(inner, names)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = _storage(tensor)
        if storage not in own and storage not in seen:
            seen[storage] = tensor  # and kept alive, or another would get its address
            sizes[inside[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with _entering(blocks) as inside, _fused_attention(), torch.autograd.graph.saved_tensors_hooks(keep, _same):
        _run(inner, torch.zeros(batch, dtype=torch.int64, device="meta"), able, keep)
    largest = max((tensor.untyped_storage().nbytes() for tensor in seen.values()), default=0)
    inputs = len(blocks) * batch[0] * batch[1] * embedding_width(inner) * inner.dtype.itemsize
    block = max((sizes[name] for name in blocks), default=0)
    return int(sizes[""] + inputs + block + _GRADIENTS * largest)


def _run(model: Any, ids: torch.Tensor, able: Sequence[str], keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """One forward pass. A classifier's head looks for where a text ends, and is left out: it keeps what it reads."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with _Unpadded():
        if able == ("sequence-classification",):
            decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            keep(model.base_model(**inputs, **decoder)[0])
        else:
            model(**inputs, labels=ids)


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


def embedding_width(model: Any) -> int:
    """The size of what a model's first block gets of a token."""
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
        """(batch, heads, length, width) of the values; a token's heads lie side by side."""
        batch, heads, length, _ = query.shape
        output = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
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
