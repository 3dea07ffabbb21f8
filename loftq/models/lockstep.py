"""Runs a model's forward over many batches in lockstep, so that only one block of layers needs its weights at a time.

Each batch runs the model's own code in a thread of its own. When that code calls a block, the thread stops. When all
batches have stopped, the block's weights are loaded, and the block runs for each batch in turn. The values that a model
passes from block to block, such as masks and an encoder's output, stay in the batch's thread, so no assumption about
them is needed.

Only one thread runs at any time, so results do not depend on scheduling. Blocks run in the calling thread, in which
torch has already started its workers: it would start as many again for each thread that computes in parallel, and never
stop them.
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
    """Callbacks for the stages of a run. All are called in the thread that called `run`."""

    def enter(self, block: str) -> None:
        """Called before the first batch runs through a block."""

    def keep(self, index: int, output: Any) -> None:
        """Called with the output of a block for a batch, before the batch continues."""

    def leave(self, block: str, rounds: int) -> None:
        """Called after the last batch ran through a block. `rounds` counts the rounds that all blocks have served."""

    def passed(self, block: str | None, rounds: int) -> None:
        """Called after one batch ran through a block, or from one block to the next (None), after so many rounds."""

    def finish(self, index: int, output: Any) -> None:
        """Called with the output of the model for a batch."""


class Past(Protocol):
    """The rounds that an earlier run has served. In a round, a block runs for all batches that wait at it."""

    rounds: int

    def output(self, index: int) -> Any:
        """The output of the last of these rounds for a batch."""

    def lost(self, index: int) -> Any:
        """A stand-in for the output of an earlier round, which was not saved."""


def find_blocks(model: nn.Module, modules: Collection[str]) -> list[str]:
    """Names of the model's blocks: the members of the outermost lists that hold any of the modules, in model order.

    A list or a dict in such a list is not a block, but its members are.
    """
    blocks: list[str] = []

    def search(name: str, module: nn.Module, listed: bool) -> None:
        listed = isinstance(module, nn.ModuleList) or (listed and isinstance(module, nn.ModuleDict))
        for key, child in module.named_children():
            inner = f"{name}.{key}" if name else key
            if listed and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                blocks.append(inner)
            elif listed or any(wanted.startswith(f"{inner}.") for wanted in modules):
                search(inner, child, listed)

    search("", model, False)
    return blocks


def run(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Mapping[str, nn.Module],
    visitor: Visitor,
    past: Past | None = None,
) -> None:
    """Run `model(**batch)` for every batch without gradients, block by block.

    `blocks` are parts of the model by name; if batches wait at several blocks, the first of these is served. A block
    may be called any number of times; it is left when a different block is entered. Rounds of the `past` do not run
    again: their blocks are neither entered nor left, and the batches get the outputs that `past` has for them. An
    exception in the forward of a batch is raised here, after all threads have ended.
    """
    workers = torch.get_num_threads()
    walks = [_Walk(model, batch, 1 if blocks else workers, workers) for batch in batches]
    with torch.no_grad(), _stopping_at(blocks):
        try:
            _serve(walks, blocks, visitor, past)
        finally:
            for walk in walks:
                walk.stop()
            torch.set_num_threads(workers)  # the number with which new threads begin


def _serve(walks: Sequence[_Walk], blocks: Mapping[str, nn.Module], visitor: Visitor, past: Past | None) -> None:
    order = {name: i for i, name in enumerate(blocks)}
    entered: str | None = None
    rounds = 0
    for index, walk in enumerate(walks):
        _advance(walk, index, None, visitor, rounds)
    while waiting := [walk for walk in walks if walk.call is not None]:
        name = min((walk.call.block for walk in waiting if walk.call), key=order.__getitem__)
        replayed = past is not None and rounds < past.rounds
        if name != entered and not replayed:
            if entered is not None:
                visitor.leave(entered, rounds)
            visitor.enter(name)
            entered = name
        for index, walk in enumerate(walks):
            if walk.call is not None and walk.call.block == name:
                if past is not None and replayed:
                    output = past.output(index) if rounds + 1 == past.rounds else past.lost(index)
                else:
                    output = walk.call.run()
                    visitor.keep(index, output)
                    visitor.passed(name, rounds)
                _advance(walk, index, output, visitor, rounds)
                del output  # so that it takes no memory while the next batch runs
        rounds += 1
    if entered is not None:
        visitor.leave(entered, rounds)


def _advance(walk: _Walk, index: int, value: Any, visitor: Visitor, rounds: int) -> None:
    walk.advance(value)
    visitor.passed(None, rounds)
    if walk.call is None:
        output, walk.output = walk.output, None
        visitor.finish(index, output)


@contextmanager
def _stopping_at(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Make calls of a block from a batch's thread wait until the main thread has run the block."""
    own = {name: module.__dict__.get("forward") for name, module in blocks.items()}
    try:
        for name, module in blocks.items():
            module.forward = _stop_before(name, module.forward)
        yield
    finally:
        for name, module in blocks.items():
            module.__dict__.pop("forward", None)  # makes the method of the class visible again
            if own[name] is not None:
                module.__dict__["forward"] = own[name]


def _stop_before(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def stop(*args: Any, **kwargs: Any) -> Any:
        walk = threading.current_thread()
        return walk.wait(_Call(name, forward, args, kwargs)) if isinstance(walk, _Walk) else forward(*args, **kwargs)

    return stop


class _Call:
    """A call of a block that waits to be run."""

    def __init__(self, block: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.block = block
        self._forward, self._args, self._kwargs = forward, args, kwargs

    def run(self) -> Any:
        return self._forward(*self._args, **self._kwargs)


class _StoppedError(BaseException):
    """Ends the thread of a batch. It is a BaseException so that no `except Exception` in a model catches it."""


class _Walk(threading.Thread):
    """The forward of one batch. `call` is the call that it waits for, or None after it has ended with `output`."""

    def __init__(self, model: nn.Module, batch: Batch, before: int, after: int) -> None:
        super().__init__(name="loftq-lockstep", daemon=True)
        self.call: _Call | None = None
        self.output: Any = None
        self._model, self._batch = model, batch
        self._before, self._after = before, after  # torch's numbers of workers before and after the first block
        self._value: Any = None
        self._error: BaseException | None = None
        self._stopped = False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        """Run the model, in the batch's thread."""
        try:
            torch.set_num_threads(self._before)
            with torch.no_grad():  # each thread has its own setting
                self.output = self._model(**self._batch)
        except _StoppedError:
            pass
        except BaseException as error:  # the main thread raises it
            self._error = error
        finally:
            self._back.release()

    def wait(self, call: _Call) -> Any:
        """Wait until the main thread has run a call, and return its result (called in the batch's thread)."""
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
        """Pass on the call's result, and wait for the next call or the end (called in the main thread)."""
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
        """End the thread, wherever it waits (called in the main thread)."""
        self._stopped = True
        self._turn.release()
        if self.ident is not None:
            self.join()
