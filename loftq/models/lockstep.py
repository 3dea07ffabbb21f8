"""A model's forward over many batches in lockstep, so that one block of layers at a time needs its weights.

Each batch runs the model's own code in a thread of its own. Where that code calls a block, it stops; when all
batches have stopped, the block's weights are loaded, and it runs for each of them in turn. What a model passes from
block to block, masks and an encoder's output included, stays with its thread: nothing is assumed of it.

One thread runs at any time, so results do not depend on scheduling. Blocks themselves run in the calling thread, where
torch has its workers already: it would start as many for each thread that computes in parallel, and keep them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

Batch = Mapping[str, torch.Tensor]


class Visitor(Protocol):
    """What is done on the way. All of it is called in the thread that called `run`."""

    def enter(self, block: str) -> None:
        """Before the first batch runs through a block."""

    def keep(self, index: int, output: Any) -> None:
        """With what a block returned for a batch, before the batch goes on."""

    def leave(self, block: str, rounds: int) -> None:
        """After the last one did: so many times have blocks served the batches that waited at them."""

    def passed(self, block: str | None) -> None:
        """After one batch ran through a block, or on between blocks (None)."""

    def finish(self, index: int, output: Any) -> None:
        """With what the model returned for a batch."""


class Past(Protocol):
    """Rounds that an earlier run has served."""

    rounds: int

    def output(self, index: int) -> Any:
        """What the last of them gave a batch."""

    def lost(self, index: int) -> Any:
        """What stands for the output of one before it."""


def find_blocks(model: nn.Module, modules: Collection[str]) -> list[str]:
    """The members of the outermost lists that hold any of the modules, in the model's order: the model's blocks.

    What is itself a list or a dict is no block, but its members are.
    """
    found: list[str] = []

    def search(name: str, module: nn.Module, listed: bool) -> None:
        listed = isinstance(module, nn.ModuleList) or (listed and isinstance(module, nn.ModuleDict))
        for key, child in module.named_children():
            inner = f"{name}.{key}" if name else key
            if listed and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                found.append(inner)
            elif listed or any(wanted.startswith(f"{inner}.") for wanted in modules):
                search(inner, child, listed)

    search("", model, False)
    return found


def run(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Mapping[str, nn.Module],
    visitor: Visitor,
    past: Past | None = None,
) -> None:
    """Run `model(**batch)` for every batch without gradients, block by block.

    `blocks` are parts of the model, by name, in the order in which those are served that batches wait at. A block may
    be called any number of times; it is left when another has its turn. Rounds of the `past` are not run again: blocks
    are neither entered nor left, and the batches get what it has for them. Whatever is raised in a batch's forward is
    raised here, after all threads have ended.
    """
    workers = torch.get_num_threads()
    walks = [_Walk(model, batch, 1 if blocks else workers, workers) for batch in batches]
    with torch.no_grad(), _stopping_at(blocks):
        try:
            _serve(walks, blocks, visitor, past)
        finally:
            for walk in walks:
                walk.stop()
            torch.set_num_threads(workers)  # what new threads begin with


def _serve(walks: Sequence[_Walk], blocks: Mapping[str, nn.Module], visitor: Visitor, past: Past | None) -> None:
    order = {name: i for i, name in enumerate(blocks)}
    entered: str | None = None
    rounds = 0
    for index, walk in enumerate(walks):
        _advance(walk, index, None, visitor)
    while waiting := [walk for walk in walks if walk.call is not None]:
        name = min((walk.call.block for walk in waiting if walk.call), key=order.__getitem__)
        known = past is not None and rounds < past.rounds
        if name != entered and not known:
            if entered is not None:
                visitor.leave(entered, rounds)
            visitor.enter(name)
            entered = name
        for index, walk in enumerate(walks):
            if walk.call is not None and walk.call.block == name:
                if past is not None and known:
                    found = past.output(index) if rounds + 1 == past.rounds else past.lost(index)
                else:
                    found = walk.call.run()
                    visitor.keep(index, found)
                    visitor.passed(name)
                _advance(walk, index, found, visitor)
                del found  # the next batch runs without this one's
        rounds += 1
    if entered is not None:
        visitor.leave(entered, rounds)


def _advance(walk: _Walk, index: int, value: Any, visitor: Visitor) -> None:
    walk.advance(value)
    visitor.passed(None)
    if walk.call is None:
        output, walk.output = walk.output, None
        visitor.finish(index, output)


@contextmanager
def _stopping_at(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let a block that is called from a batch's thread be run by the main thread."""
    own = {name: module.__dict__.get("forward") for name, module in blocks.items()}
    try:
        for name, module in blocks.items():
            module.forward = _stop_before(name, module.forward)
        yield
    finally:
        for name, module in blocks.items():
            module.__dict__.pop("forward", None)  # what the class defines is there again
            if own[name] is not None:
                module.__dict__["forward"] = own[name]


def _stop_before(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def stop(*args: Any, **kwargs: Any) -> Any:
        walk = threading.current_thread()
        return walk.wait(_Call(name, forward, args, kwargs)) if isinstance(walk, _Walk) else forward(*args, **kwargs)

    return stop


class _Call:
    """A block's call that waits to be run."""

    def __init__(self, block: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.block = block
        self._forward, self._args, self._kwargs = forward, args, kwargs

    def run(self) -> Any:
        return self._forward(*self._args, **self._kwargs)


class _StoppedError(BaseException):
    """Ends a batch's thread; no model's `except Exception` catches it."""


class _Walk(threading.Thread):
    """One batch's forward. `call` is what it waits for, None once it has ended with `output`."""

    def __init__(self, model: nn.Module, batch: Batch, before: int, after: int) -> None:
        super().__init__(name="loftq-lockstep", daemon=True)
        self.call: _Call | None = None
        self.output: Any = None
        self._model, self._batch = model, batch
        self._before, self._after = before, after  # torch's workers, until the first block was run and then
        self._value: Any = None
        self._error: BaseException | None = None
        self._stopped = False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        """The thread's own part."""
        try:
            torch.set_num_threads(self._before)
            with torch.no_grad():  # is each thread's own
                self.output = self._model(**self._batch)
        except _StoppedError:
            pass
        except BaseException as error:  # is raised in the main thread
            self._error = error
        finally:
            self._back.release()

    def wait(self, call: _Call) -> Any:
        """Have a call run by the main thread (in the batch's thread)."""
        self.call = call
        del call
        self._back.release()
        self._turn.acquire()
        if self._stopped:
            raise _StoppedError
        torch.set_num_threads(self._after)
        value, self._value = self._value, None
        return value

    def advance(self, value: Any) -> None:
        """Give the call's result, and wait for the next call or the end (in the main thread)."""
        self.call, self._value = None, value
        del value
        if self.ident is None:
            self.start()
        else:
            self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the thread, wherever it waits (in the main thread)."""
        self._stopped = True
        self._turn.release()
        if self.ident is not None:
            self.join()
