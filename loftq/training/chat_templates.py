"""Writes messages with a chat template, within limits of time and size: a template is a program that a model brings.

transformers renders it in jinja's sandbox, which keeps a template from files and from Python, but not from loops that
never end and from texts that fill the memory. So the first conversation is written in a fork of this process, whose
time and memory the system limits. After that a watch interrupts a template that takes too long.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import OptionError

SECONDS = 10.0  # in which a template must have written a conversation, which takes milliseconds
_MEMORY = 2**30  # bytes that it may take
_LENGTH, _TIMES = 1_000_000, 100  # it may write this many characters, and as many times those of the messages
_ADVICE = "add --no-chat-template, or correct the template"
_tried: set[str] = set()  # the templates that have written a conversation within the limits


def write_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, answer: bool = False) -> str:
    """Write messages with a tokenizer's chat template; with `answer`, the beginning of an answer follows them.

    Raises OptionError if the template refuses the messages, does not end, or writes too much.
    """
    most = _LENGTH + _TIMES * sum(len(str(message)) for message in messages)

    def render() -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer))

    template = str(tokenizer.chat_template)
    if template not in _tried:
        _try(render, most)
        _tried.add(template)
    try:
        with _watch.limit(SECONDS):
            text = render()
    except _TooLongError as error:
        raise _endless() from error
    except Exception as error:  # a template is a program and may raise any error
        raise OptionError(
            f"the chat template refuses a conversation in the data: {one_line(error, 300)}: add --no-chat-template, or "
            "correct the conversation"
        ) from error
    if len(text) > most:
        raise _too_large()
    return text


def _endless() -> OptionError:
    return OptionError(f"the chat template does not end within {SECONDS:g} seconds: {_ADVICE}")


def _too_large() -> OptionError:
    return OptionError(f"the chat template writes a text that is far longer than the conversation: {_ADVICE}")


_FINE, _LARGE = 0, 3  # exit codes of the fork


def _try(render: Callable[[], str], most: int) -> None:
    """Render in a fork with limits. Raises OptionError where they are exceeded. Other errors come again without it."""
    if not hasattr(os, "fork"):
        return
    reader, writer = os.pipe()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the fork uses no lock of another thread
            pid = os.fork()
    except OSError:  # the system has no process left
        os.close(reader)
        os.close(writer)
        return
    if pid == 0:
        _render_and_exit(render, most)
    os.close(writer)
    try:
        ended = bool(select.select([reader], [], [], SECONDS)[0])  # the fork closes the pipe when it ends
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    if not ended or code == -signal.SIGXCPU:
        raise _endless()
    if code == _LARGE or (code < 0 and code != -signal.SIGKILL):
        raise _too_large()


def _render_and_exit(render: Callable[[], str], most: int) -> None:
    """In the fork: limit the time and the memory, render, and end without cleaning up what belongs to the parent."""
    code = _FINE
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        seconds = int(time.process_time() + SECONDS) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        with suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            memory = pages * resource.getpagesize() + _MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        code = _LARGE if len(render()) > most else _FINE
    except MemoryError:
        code = _LARGE
    finally:
        os._exit(code)


class _TooLongError(Exception):
    """A template has taken too long."""


class _Watch:
    """Interrupts the thread that renders when its time is over. One thread watches for all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}  # by the thread that renders
        self._thread: threading.Thread | None = None

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raise _TooLongError in the block if it takes longer."""
        here = threading.get_ident()
        if self._thread is None or not self._thread.is_alive():  # a fork has no threads of its parent
            self._lock = threading.Lock()
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._ends[here] = time.monotonic() + seconds
        try:
            yield
        finally:
            with self._lock:
                if self._ends.pop(here, None) is None:  # interrupted, or about to be
                    _interrupt(here, None)

    def _run(self) -> None:
        while True:
            time.sleep(0.2)
            with self._lock:
                now = time.monotonic()
                for thread in [thread for thread, end in list(self._ends.items()) if now > end]:
                    del self._ends[thread]
                    _interrupt(thread, _TooLongError)


def _interrupt(thread: int, error: type[Exception] | None) -> None:
    """Raise an error in a thread at its next step in Python; with None, take back one that was not raised yet."""
    value = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)


_watch = _Watch()
