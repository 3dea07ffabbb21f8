"""Sums up the inputs of each layer while the model runs, and keeps the tokens that reach fused experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from loftq.calibration.block_weights import BlockWeights
from loftq.calibration.input_files import InputFiles, Sharing
from loftq.calibration.progress import Progress
from loftq.calibration.routed_tokens import RoutedTokens
from loftq.core.moments import Moment
from loftq.errors import SourceError
from loftq.models.tasks import CAUSAL
from loftq.planning.plan import Plan

TOP = 256  # number of tokens whose log-probabilities are kept at each position
VOCABULARY = (*CAUSAL, "seq2seq-lm", "masked-lm")  # tasks whose models predict tokens


class _Input(NamedTuple):
    """An input tensor of modules, and its version, which counts the times that it was written to."""

    tensor: torch.Tensor
    version: int
    modules: list[str]


class InputRecorder:
    """Records the inputs of a plan's layers while a model runs.

    Inputs of linears are kept until their batch has passed the block, because only then is it known which modules share
    an input. The tokens of an experts module are kept as they are (`routed_tokens`).
    """

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self._plan, self._model = plan, model
        self._inputs: dict[int, _Input] = {}
        self._routed: list[tuple[str, RoutedTokens]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the inputs of the plan's layers while the model runs."""
        handles = [
            self._model.get_submodule(layer.module).register_forward_pre_hook(
                partial(self._record_input, layer.module), with_kwargs=True
            )
            for layer in self._plan.linears
        ] + [
            self._model.get_submodule(owner).register_forward_pre_hook(
                partial(self._record_tokens, owner), with_kwargs=True
            )
            for owner in dict.fromkeys(layer.owner for layer in self._plan.stacks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take_inputs(self) -> Iterator[tuple[Sharing, torch.Tensor]]:
        """The inputs of linears since the last call, each with the modules that share it."""
        for entry in self._inputs.values():
            self._check_unchanged(entry)
            if entry.tensor.numel():
                yield tuple(entry.modules), entry.tensor
        self._inputs.clear()

    def take_tokens(self) -> list[tuple[str, RoutedTokens]]:
        """The tokens of experts modules since the last call."""
        routed, self._routed = self._routed, []
        return routed

    def _record_input(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensor = args[0] if args else next(iter(kwargs.values()))
        entry = self._inputs.setdefault(id(tensor), _Input(tensor, tensor._version, []))
        self._check_unchanged(entry)
        entry.modules.append(name)

    def _record_tokens(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._routed.append((name, RoutedTokens.of_call(args, kwargs)))

    def _check_unchanged(self, entry: _Input) -> None:
        if entry.tensor._version != entry.version:
            raise SourceError(
                f"{entry.modules[0]} cannot be calibrated, because its input is overwritten later in its block: "
                f"add --exclude-modules {entry.modules[0].rpartition('.')[2]}"
            )


class InputObserver:
    """Sums up the inputs of linears in this process, and keeps the tokens of a block until it is left.

    It is a visitor of `lockstep.run`.
    """

    def __init__(
        self,
        plan: Plan,
        weights: BlockWeights,
        files: InputFiles,
        bar: Any,
        answers: list[dict[str, torch.Tensor]],
        progress: Progress,
    ) -> None:
        weights.digests |= progress.digests
        self.recorder = InputRecorder(plan, weights.model)
        self._progress, self._files = progress, files
        self._plan, self._weights, self._bar, self._answers = plan, weights, bar, answers
        self._sums: dict[Sharing, Moment] = {}
        self._routed: dict[str, list[RoutedTokens]] = {}

    def enter(self, block: str) -> None:
        self._weights.load(block)
        self._progress.begin()

    def keep(self, index: int, output: Any) -> None:
        self._progress.keep(index, output)

    def leave(self, block: str, rounds: int) -> None:
        self._weights.drop(block)
        self.save(block)
        self._progress.end(rounds, len(self._answers), self._files.modules, self._weights.digests, self._files.count)

    def passed(self, block: str | None, rounds: int) -> None:  # noqa: ARG002
        for modules, tensor in self.recorder.take_inputs():
            self._sums.setdefault(modules, Moment(tensor.shape[-1], tensor.device)).add(tensor)
        for module, tokens in self.recorder.take_tokens():
            self._routed.setdefault(module, []).append(tokens)
        if block is not None or not self._weights.blocks:
            self._bar.update(1)

    def finish(self, index: int, output: Any) -> None:
        self._answers[index] = answer_of(output, self._plan.task.name in VOCABULARY)

    def save(self, block: str | None) -> None:
        """Write the moments and the tokens of a block's layers, or of all remaining layers, and free them."""
        owners = [name for name in self._routed if is_within(name, block)]
        keys = [key for key in self._sums if is_within(key[0], block)]
        self._files.save({key: self._sums.pop(key) for key in keys}, {name: self._routed.pop(name) for name in owners})


def is_within(module: str, block: str | None) -> bool:
    """Whether a module lies in a block; every module does if no block is given."""
    return block is None or module.startswith(f"{block}.")


def answer_of(output: Any, vocabulary: bool) -> dict[str, torch.Tensor]:
    """The largest log-probabilities at each position, or else the last hidden states, on the CPU."""
    if not vocabulary:
        return {"hidden": output[0].to("cpu", torch.bfloat16)}
    logits = output.logits
    k = min(TOP, logits.shape[-1])
    values, indices = [], []
    for rows in torch.split(logits.flatten(0, 1), 512):  # the logits of a whole vocabulary in float32 are large
        rows = rows.float()
        top = rows.topk(k)
        values.append((top.values - rows.logsumexp(-1, keepdim=True)).to("cpu", torch.float16))
        indices.append(top.indices.to("cpu", torch.int32))
    shape = (*logits.shape[:2], k)
    return {"values": torch.cat(values).view(shape), "indices": torch.cat(indices).view(shape)}
