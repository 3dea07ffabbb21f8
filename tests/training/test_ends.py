"""What ends an answer. Oracle: what was trained to be the end."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pico_templates as templates
import pytest
from conftest import byte_tokenizer, pico_llama

import loftq
from loftq.training.ends import Ends, turn_end


@pytest.mark.parametrize(
    ("template", "want"),
    [
        (None, Ends()),
        (templates.CHATML, Ends((258,), written=("<|im_end|>",))),
        (templates.LLAMA_2, Ends((257,), written=("</s>",), space=" ")),
        (templates.PHI_3, Ends(texts=("<|end|>",))),
        (templates.EOS_END, Ends((257,), written=("</s>",))),
        (templates.PLAIN_END, Ends(texts=("</>",))),
        (templates.LABELLED, Ends(texts=("\nuser:",))),
        ("{{ messages[-1].content }}", Ends()),
        ("{{ raise_exception('no') }}", Ends()),
    ],
)
def test_a_template_ends_a_turn(template: str | None, want: Ends) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = template
    assert turn_end(tokenizer) == want


def test_an_unfinished_end_is_held_back() -> None:
    ends = Ends(texts=("</>", "\nuser:"), space=" ")
    text = "a <b> </c> ok </> more"
    shown = [ends.certain(text[:size]) for size in range(len(text) + 1)]
    assert all(other.startswith(one) for one, other in pairwise(shown))
    assert shown[-1] == ends.cut(text) == "a <b> </c> ok"
    assert ends.certain("two\nuse") == "two"


@pytest.mark.parametrize(
    ("template", "special"),
    [
        pytest.param(templates.CHATML, True, marks=pytest.mark.slow),
        (templates.CHATML, False),
        (templates.PLAIN_END, True),
        pytest.param(templates.LLAMA_2, True, marks=pytest.mark.slow),
        pytest.param(templates.PHI_3, True, marks=pytest.mark.slow),
    ],
    ids=["chatml", "chatml-not-special", "plain", "llama-2", "phi-3"],
)
def test_a_trained_model_stops(template: str, special: bool, tmp_path: Path) -> None:
    """Where the template that it was trained on ends an answer, streamed too; the folder has another one by then."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=special)
    tokenizer.chat_template = template
    pico_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = loftq.quantize(str(tmp_path / "model"), output=tmp_path / "out", rank=4, iters=1, quiet=True).folder
    rows = "".join(json.dumps({"prompt": letter, "response": "ok"}) + "\n" for letter in "abcd")
    (tmp_path / "rows.jsonl").write_text(rows)
    steps = 150 if template == templates.PHI_3 else 60
    options: dict[str, Any] = {"max_steps": steps, "learning_rate": 2e-2, "eval_steps": 999, "save_steps": 999}
    loftq.train(
        str(folder), data=[str(tmp_path / "rows.jsonl")], output=tmp_path / "trained", quiet=True, cpu=True, **options
    )
    (folder / "chat_template.jinja").write_text(templates.LABELLED)
    stream = io.StringIO()
    asked = {"adapter": str(tmp_path / "trained"), "max_new_tokens": 20, "cpu": True}
    before = " " if template == templates.LLAMA_2 else ""  # it begins answers with a space
    assert loftq.generate(str(folder), "a", stream=stream, **asked) == f"{before}ok"
    assert stream.getvalue() == f"{before}ok\n"
