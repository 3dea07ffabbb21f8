"""Writes messages with a chat template, within limits of time and size: a template is a program that a model brings.

transformers renders it in jinja's sandbox, which keeps a template from files and from Python, but not from loops that
never end and from texts that fill the memory. So the first conversation is written in a fork of this process, whose
time and memory the system limits. After that a watch interrupts a template that takes too long.
"""

from __future__ import annotations

import ctypes
import os
import re
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
from loftq.models.message_keys import says_something

SECONDS = 10.0  # in which a template must have written a conversation, which takes milliseconds
_MEMORY = 2**30  # bytes that it may take
_LENGTH, _TIMES = 1_000_000, 100  # it may write this many characters, and as many times those of the messages
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_tried: set[str] = set()  # the templates that have written a conversation within the limits


Messages = Sequence[Mapping[str, Any]]


def write_messages(
    tokenizer: Any, messages: Messages, *, answer: bool = False, variables: Mapping[str, Any] | None = None
) -> str:
    """Write messages with a tokenizer's chat template; with `answer`, the beginning of an answer follows them.

    `variables` are given to the template beside the messages, such as `tools`. Raises OptionError if the template
    refuses the messages, does not end, or writes too much.
    """
    variables = variables or {}

    def render() -> str:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer, **variables)
        )

    return _limited(tokenizer, render, messages, variables)


def marked_answers(tokenizer: Any, messages: Messages, variables: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The first and last places of what a template marks with `{% generation %}` in the messages that it writes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(None, variables.get("tools"))
    if not _MARKS.search(template):
        return []
    places: list[tuple[int, int]] = []

    def render() -> str:
        written: Any = render_jinja_template(  # a list of texts, and a list of their places
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **variables},
        )
        places[:] = [(int(start), int(end)) for start, end in written[1][0]]
        return str(written[0][0])

    _limited(tokenizer, render, messages, variables)
    return places


def is_single_turn(messages: Messages) -> bool:
    """Whether messages are a prompt, perhaps after a system message, and perhaps its answer, all of them plain text."""
    roles = [message.get("role") for message in messages]
    keys = {key for message in messages for key, value in message.items() if says_something(key, value)}
    plain = all(isinstance(message.get("content"), str) for message in messages)
    return (
        plain and keys <= {"role", "content"} and roles[roles[:1] == ["system"] :] in (["user"], ["user", "assistant"])
    )


def without_template(messages: Messages, variables: Mapping[str, Any]) -> str:
    """The advice to leave the chat template out, where that is possible: only for a single prompt with its answer."""
    return "add --no-chat-template, or " if is_single_turn(messages) and not variables else ""


def _limited(tokenizer: Any, render: Callable[[], str], messages: Messages, variables: Mapping[str, Any]) -> str:
    most = _LENGTH + _TIMES * sum(len(str(value)) for value in (*messages, *variables.values()))
    advice = without_template(messages, variables)
    template = str(tokenizer.chat_template)
    if template not in _tried:
        _try(render, most, advice)
        _tried.add(template)
    try:
        with _watch.limit(SECONDS):
            text = render()
    except _TooLongError as error:
        raise _endless(advice) from error
    except Exception as error:  # a template is a program and may raise any error
        raise OptionError(
            f"the chat template refuses a conversation in the data: {one_line(error, 300)}: {advice}correct the "
            "conversation"
        ) from error
    if len(text) > most:
        raise _too_large(advice)
    return text


def _endless(advice: str) -> OptionError:
    return OptionError(f"the chat template does not end within {SECONDS:g} seconds: {advice}correct the template")


def _too_large(advice: str) -> OptionError:
    return OptionError(
        f"the chat template writes a text that is far longer than the conversation: {advice}correct the template"
    )


_FINE, _LARGE = 0, 3  # exit codes of the fork


def _try(render: Callable[[], str], most: int, advice: str) -> None:
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
        raise _endless(advice)
    if code == _LARGE or (code < 0 and code != -signal.SIGKILL):
        raise _too_large(advice)


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
