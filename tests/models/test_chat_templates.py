"""Templates that do not end or write too much. Oracle: the clock, the error, and transformers' own rendering."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer

import loftq
from loftq.errors import OptionError
from loftq.models import chat_templates
from loftq.models.chat_templates import write_messages

Run = Callable[..., Any]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is the first to use its template."""
    monkeypatch.setattr(chat_templates, "_tried", set())


@pytest.mark.parametrize("text", ["", "xxxx"])
def test_a_template_that_does_not_end_is_stopped(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 0.6)
    started = time.monotonic()
    with pytest.raises(OptionError, match=r"does not end within 0\.6 seconds: add --no-chat-template"):
        write_messages(with_template(ENDLESS.replace("%}{% endfor", f"%}}{text}{{% endfor", 1)), HI)
    assert time.monotonic() - started < 10


def with_template(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ ('x' * messages|length) * 10**11 }}", "far longer than the conversation"),
        ("{{ 'x'.ljust(10**11) }}", "far longer than the conversation"),
        ("{{ 'x' * 1100000 }}", "far longer than the conversation"),
        ("{% for i in range(10**9) %}{% endfor %}", "refuses a conversation .* Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "refuses a conversation .* recursion"),
        ("{% for", "refuses a conversation .* unexpected 'end of template'"),
        ("{{ raise_exception('roles must alternate') }}", "refuses a conversation .* roles must alternate"),
        ("{{ messages[0].content.nothing.there }}", "refuses a conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses a conversation"),
    ],
)
def test_a_template_that_is_no_good_is_one_line(template: str, match: str) -> None:
    with pytest.raises(OptionError, match=match) as refused:
        write_messages(with_template(template), HI)
    assert "\n" not in str(refused.value)


def test_a_template_is_watched_after_its_first_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the main thread and in another one."""
    tokenizer = with_template(f"{{% if messages|length > 1 %}}{ENDLESS}{{% endif %}}fine")
    assert write_messages(tokenizer, HI) == "fine"
    monkeypatch.setattr(chat_templates, "SECONDS", 0.6)
    errors: list[Exception] = []

    def render() -> None:
        try:
            write_messages(tokenizer, HI * 2)
        except OptionError as error:
            errors.append(error)

    render()
    thread = threading.Thread(target=render)
    thread.start()
    thread.join(20)
    assert [str(error)[:30] for error in errors] == ["the chat template does not end"] * 2
    monkeypatch.undo()
    assert write_messages(tokenizer, HI) == "fine"  # nothing is left to interrupt it


def test_what_is_written_is_transformers_own() -> None:
    tokenizer = with_template(TURNS)
    for messages in (HI, HI * 3, [{"role": "user", "content": "x" * 100_000}]):
        assert write_messages(tokenizer, messages) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("template", ["", " \n"])
def test_an_empty_template_and_an_empty_prompt(template: str, pico: Path, tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(pico, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused = run("generate", folder, "--prompt", "hi", "--max-new-tokens", 2, "--cpu")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert "chat template is empty: add --no-chat-template" in refused.stderr
    if template:
        return
    assert (
        run("generate", folder, "--prompt", "hi", "--max-new-tokens", 2, "--no-chat-template", "--cpu").exit_code == 0
    )
    with pytest.raises(OptionError, match="--prompt has no tokens"):
        loftq.generate(str(folder), "", chat_template=False, max_new_tokens=2, cpu=True)
    with pytest.raises(OptionError, match="half of a surrogate pair"):
        loftq.generate(str(folder), "\ud800", chat_template=False, max_new_tokens=2, cpu=True)


def test_a_template_that_writes_nothing(pico: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{# nothing #}")
    with pytest.raises(OptionError, match="the chat template writes nothing"):
        loftq.generate(str(folder), "hi", max_new_tokens=2, cpu=True)
