"""Chats. Oracle: transformers' own greedy generation on the conversation that the chat template writes.

Covers: cli/chat.py, cli/wrapping.py, loftq/training/chat_session.py, loftq/training/sampling.py,
loftq/training/streaming.py, loftq/training/writer.py.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import loftq
from loftq.errors import OptionError, OutputError
from loftq.training.chat import Chat
from loftq.training.chat_session import Session
from loftq.training.sampling import Sampling
from loftq.training.writer import Writer, open_writer
from loftq_cli.wrapping import Wrapped

Run = Callable[..., Any]
COUNT = 6


@pytest.fixture(scope="module")
def artifact(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "out"
    return loftq.quantize(str(pico), output=folder, rank=4, iters=1, quiet=True).folder


@pytest.fixture(scope="module")
def writer(artifact: Path) -> Writer:
    return open_writer(str(artifact), None, Sampling(max_new_tokens=COUNT), dtype="float32")


@pytest.fixture(scope="module")
def greedy(artifact: Path) -> Callable[[str], str]:
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    model = loftq.load_qlora(artifact, is_trainable=False, dtype=torch.float32).eval()

    def answer(text: str) -> str:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        written = model.generate(input_ids=ids, max_new_tokens=COUNT, do_sample=False, pad_token_id=257)
        return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))

    return answer


def lines_of(words: list[str]) -> Callable[[str], str]:
    """What reads lines, then the end of the input; the word `^C` is Ctrl-C."""
    left: Iterator[str] = iter(words)

    def read(_prompt: str) -> str:
        word = next(left, None)
        if word == "^C":
            raise KeyboardInterrupt
        if word is None:
            raise EOFError
        return word

    return read


def talk(chat: Chat, *words: str, patient: bool = True) -> tuple[str, list[str], bool]:
    """The answers, the lines of the session, and whether something was refused."""
    stream, said = io.StringIO(), list[str]()
    session = Session(chat, lines_of(list(words)), said.append, stream, patient=patient)
    session.run()
    return stream.getvalue(), said, session.refused


def test_lines_on_the_input_are_turns_of_one_conversation(
    artifact: Path, greedy: Callable[[str], str], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hi\n\nand\\\nnow?\n/save {tmp_path / 'talk.jsonl'}\n"))
    result = run("chat", artifact, "--system", "be brief", "--max-new-tokens", COUNT, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    first = greedy("system: be brief\nuser: hi\n")
    text = f"system: be brief\nuser: hi\nassistant: {first}\nuser: and\nnow?\n"
    assert result.stdout == f"{first}\n{greedy(text)}\n"
    row = json.loads((tmp_path / "talk.jsonl").read_text())
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in row["messages"]][:3] == ["be brief", "hi", first]


def test_commands_change_the_conversation(writer: Writer, greedy: Callable[[str], str]) -> None:
    chat = Chat(writer)
    words = ("hi", "/reset", "/system be kind", "ho", "/system", "/nonsense", "/save", "/exit", "x")
    answers, said, refused = talk(chat, *words)
    assert answers == f"{greedy('user: hi' + chr(10))}\n{greedy('system: be kind' + chr(10) + 'user: ho' + chr(10))}\n"
    assert chat.messages[0]["content"] == "ho"
    assert "There is no command /nonsense." in said[3]
    assert not refused


def test_what_was_saved_stays(writer: Writer, tmp_path: Path) -> None:
    chat = Chat(writer, turns=[{"role": "user", "content": "x"}])
    chat.save(tmp_path / "one.jsonl")
    before = (tmp_path / "one.jsonl").read_bytes()
    for path, problem in ((tmp_path / "one.jsonl", "exists already"), (tmp_path / "no" / "x", "No such file")):
        with pytest.raises(OutputError, match=problem):
            chat.save(path)
    assert (tmp_path / "one.jsonl").read_bytes() == before
    with pytest.raises(OptionError, match="nothing to save"):
        Chat(writer).save(tmp_path / "two.jsonl")


def test_a_long_conversation_loses_its_oldest_turns_and_says_so(writer: Writer) -> None:
    """The model reads 128 tokens, and here a token is a byte."""
    chat = Chat(writer)
    _, said, _ = talk(chat, "a" * 40, "b" * 40, "c" * 40)
    (note,) = said
    assert "longer than the 128 tokens" in note
    assert "the oldest turn was left out" in note
    assert [turn["content"][0] for turn in chat.turns if turn["role"] == "user"] == ["b", "c"]
    _, said, refused = talk(chat, "d" * 200)
    assert refused
    assert "shorten it" in said[0]
    assert chat.turns[-1]["role"] == "assistant", "the refused message is no part of the conversation"


class Stopping(io.StringIO):
    """A stream on which Ctrl-C arrives with the first text."""

    def write(self, text: str) -> int:
        super().write(text)
        if text.strip():
            raise KeyboardInterrupt
        return len(text)


def test_ctrl_c_stops_an_answer_and_twice_leaves(writer: Writer) -> None:
    chat, said, stream = Chat(writer), list[str](), Stopping()
    with pytest.raises(KeyboardInterrupt):
        Session(chat, lines_of(["hi", "^C"]), said.append, stream, patient=True).run()
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    assert "Ctrl-C again leaves" in said[0]
    chat.reset()
    answers, said, _ = talk(chat, "^C", "hi", "^C")
    assert answers
    assert len(said) == 2
    with pytest.raises(KeyboardInterrupt):
        talk(chat, "^C", patient=False)


def test_without_a_template_each_message_is_answered_as_it_was_trained(
    artifact: Path, greedy: Callable[[str], str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nho\n"))
    result = run("chat", artifact, "--no-chat-template", "--max-new-tokens", COUNT, "--dtype", "float32")
    assert result.stdout == f"{greedy('hi' + chr(10))}\n{greedy('ho' + chr(10))}\n"


def test_lines_break_between_words() -> None:
    """Oracle: the words are the same, and no line is longer than the terminal, except in a block of code."""
    text = "one two three four five six seven\n```\n" + "x = 1; " * 9 + "\n```\nten eleven twelve thirteen fourteen\n"
    stream = io.StringIO()
    wrapped = Wrapped(stream, 20)
    for start in range(0, len(text), 7):
        wrapped.write(text[start : start + 7])
    plain = io.StringIO()
    whole = Wrapped(plain, 20)
    for word in text.split(" "):
        whole.write(f"{word} ")
    lines = plain.getvalue().split("\n")
    assert plain.getvalue().split() == text.split()
    assert [line for line in lines if len(line.rstrip()) > 19] == ["x = 1; " * 9]
    assert stream.getvalue().replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_person_at_a_terminal(artifact: Path) -> None:
    """A real process at a pseudo-terminal: it prompts, answers, recalls a line, and ends at Ctrl-D."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "loftq_cli.main", "chat", str(artifact), "--max-new-tokens", "4"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(ours, 1024)
        shown = shown.partition(text)[2]

    wait_for(b"/help shows the commands")
    wait_for(b"> ")
    os.write(ours, b"/system one\n")
    wait_for(b"The system message is set.")
    wait_for(b"> ")
    os.write(ours, b"\x1b[A\n")  # the last line again
    wait_for(b"/system one")
    wait_for(b"The system message is set.")
    wait_for(b"> ")
    os.write(ours, b"\x04")
    assert process.wait(timeout=60) == 0
    os.close(ours)
