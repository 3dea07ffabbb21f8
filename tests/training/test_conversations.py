"""Rows as people have them. Oracle: the same conversation as OpenAI's messages, given to transformers.

Covers: loftq/hub/conversations.py, loftq/training/written.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico_templates as templates
import pytest
from conftest import byte_tokenizer
from datasets import Dataset
from rows import write_rows

from loftq.errors import OptionError
from loftq.training.data import read_rows
from loftq.training.encoding import IGNORED, Encoder
from loftq.training.tasks import TRAINING_TASKS

Messages = list[dict[str, Any]]
ASKED, ANSWERED = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."}
FUNCTION = {"name": "rain", "arguments": {"city": "Bonn"}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}]}
RESULT = {"role": "tool", "content": "dry"}
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"city": {"type": "string"}}}}]
# Messages of other roles are dropped.
ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endif %}"
    "{% endfor %}"
)
PARTS = (("user", ("Ra", "in?")), ("assistant", ("No", ".")))
NAMED = templates.PLAIN_END.replace("<{{ m.role }}>", "<{{ m.role }}{{ ' ' + m.name if m.name else '' }}>")


def encoder(template: str | None, **options: Any) -> Encoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, "causal-lm", 4096, **options)


def encode(rows: list[dict[str, Any]], template: str | None = templates.CHATML, **options: Any) -> list[dict[str, Any]]:
    return list(TRAINING_TASKS["sft"].encode(Dataset.from_list(rows), {}, encoder(template, **options)))


def learned(example: dict[str, Any]) -> str:
    return str(byte_tokenizer().decode([label for label in example["labels"] if label != IGNORED]))


CASES: dict[str, tuple[dict[str, Any], Messages, dict[str, Any], str]] = {
    # a row, its messages and variables for transformers, and what is learned
    "tools": (
        {"messages": [ASKED, CALL, RESULT, ANSWERED], "tools": TOOLS},
        [ASKED, CALL, RESULT, ANSWERED],
        {"tools": TOOLS},
        f"<call>{json.dumps(FUNCTION)}</call><|im_end|>\nNo.<|im_end|>\n",
    ),
    "tools as JSON": (
        {"messages": json.dumps([ASKED, ANSWERED]), "tools": json.dumps(TOOLS)},
        [ASKED, ANSWERED],
        {"tools": TOOLS},
        "No.<|im_end|>\n",
    ),
    "no content beside calls": (
        {"messages": [ASKED, {**CALL, "content": None}, RESULT, ANSWERED]},
        [ASKED, {**CALL, "content": None}, RESULT, ANSWERED],
        {},
        f"<call>{json.dumps(FUNCTION)}</call><|im_end|>\nNo.<|im_end|>\n",
    ),
    "functions": (
        {
            "messages": [ASKED, {"role": "assistant", "content": None, "function_call": FUNCTION}],
            "functions": [TOOLS[0]["function"]],
        },
        [ASKED, CALL],
        {"tools": TOOLS},
        f"<call>{json.dumps(FUNCTION)}</call><|im_end|>\n",
    ),
    "weights": (
        {"messages": [{**ASKED, "weight": 0}, {**ANSWERED, "weight": 0}, ASKED, {**ANSWERED, "weight": 1}]},
        [ASKED, ANSWERED, ASKED, ANSWERED],
        {},
        "No.<|im_end|>\n",
    ),
    "train": (
        {"messages": [ASKED, {**ANSWERED, "train": False}, ASKED, {**ANSWERED, "content": "Yes."}]},
        [ASKED, ANSWERED, ASKED, {**ANSWERED, "content": "Yes."}],
        {},
        "Yes.<|im_end|>\n",
    ),
    "parts": (
        {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": t} for t in texts]} for role, texts in PARTS
            ]
        },
        [ASKED, ANSWERED],
        {},
        "No.<|im_end|>\n",
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": json.dumps(FUNCTION)},
                {"from": "observation", "value": "dry"},
                {"from": "gpt", "value": "No."},
            ],
            "tools": json.dumps(TOOLS),
        },
        [{"role": "system", "content": "s"}, ASKED, CALL, RESULT, ANSWERED],
        {"tools": TOOLS},
        f"<call>{json.dumps(FUNCTION)}</call><|im_end|>\nNo.<|im_end|>\n",
    ),
    "ShareGPT, system column": (
        {"system": "s", "conversations": [{"from": "human", "value": "Rain?"}, {"from": "gpt", "value": "No."}]},
        [{"role": "system", "content": "s"}, ASKED, ANSWERED],
        {},
        "No.<|im_end|>\n",
    ),
    "assistant first": (
        {"messages": [ANSWERED, ASKED, ANSWERED]},
        [ANSWERED, ASKED, ANSWERED],
        {},
        "No.<|im_end|>\n",
    ),
    "Alpaca": (
        {"instruction": "Rain?", "input": "In Bonn", "output": "No.", "system": "s", "history": [["a", "b"]]},
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "Rain?\n\nIn Bonn"},
            ANSWERED,
        ],
        {},
        "b<|im_end|>\nNo.<|im_end|>\n",
    ),
    "Alpaca, nothing more": (
        {"instruction": "Rain?", "input": "", "output": "No.", "system": None, "history": []},
        [ASKED, ANSWERED],
        {},
        "No.<|im_end|>\n",
    ),
    "trl": (
        {"prompt": [ASKED, {**ANSWERED, "content": "Dry."}, ASKED], "completion": [ANSWERED]},
        [ASKED, {**ANSWERED, "content": "Dry."}, ASKED, ANSWERED],
        {},
        "No.<|im_end|>\n",
    ),
    "trl, system column and a text": (
        {"prompt": [ASKED], "completion": "No.", "system": "s", "tools": TOOLS},
        [{"role": "system", "content": "s"}, ASKED, ANSWERED],
        {"tools": TOOLS},
        "No.<|im_end|>\n",
    ),
    "XTuner": (
        {"conversation": [{"system": "s", "input": "Rain?", "output": "No."}, {"input": "Snow?", "output": "Yes."}]},
        [
            {"role": "system", "content": "s"},
            ASKED,
            ANSWERED,
            {**ASKED, "content": "Snow?"},
            {**ANSWERED, "content": "Yes."},
        ],
        {},
        "No.<|im_end|>\nYes.<|im_end|>\n",
    ),
    "turns": (
        {"conversation": [{"human": "Rain?", "assistant": "No."}]},
        [ASKED, ANSWERED],
        {},
        "No.<|im_end|>\n",
    ),
    "other names": (
        {"dialogue": [{"from": "user", "text": "Rain?"}, {"from": "assistant", "text": "No."}]},
        [ASKED, ANSWERED],
        {},
        "No.<|im_end|>\n",
    ),
    "notes": (
        {"messages": [{**ASKED, "id": "7", "timestamp": 3, "source": "x", "name": " "}, ANSWERED], "id": 4},
        [ASKED, ANSWERED],
        {},
        "No.<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_row_says_is_written(name: str) -> None:
    row, messages, variables, want = CASES[name]
    example = encode([row])[0]
    tokenizer = encoder(templates.CHATML).tokenizer
    assert example["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False, **variables)
    assert learned(example) == want


def test_keys_that_other_rows_have_are_not_there(tmp_path: Path) -> None:
    """`datasets` fills them with None, at any depth. Oracle: transformers on the rows as they stand in the file."""
    other = {"name": "snow", "arguments": {"depth": "1"}}
    rows = [
        {"messages": [ASKED, CALL, RESULT, ANSWERED], "tools": TOOLS},
        {"messages": [ASKED, {**CALL, "tool_calls": [{"type": "function", "function": other}]}], "tools": TOOLS},
        {"messages": [ASKED, {**ANSWERED, "weight": 1}]},
    ]
    data = read_rows([str(write_rows(tmp_path / "rows.jsonl", rows))])
    found = TRAINING_TASKS["sft"].encode(data, {}, encoder(templates.CHATML))
    tokenizer = encoder(templates.CHATML).tokenizer
    for example, row in zip(found, rows, strict=True):
        want = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), return_dict=False)
        assert example["input_ids"] == want


def test_a_name_and_reasoning_are_written() -> None:
    named = encode([{"messages": [{**ASKED, "name": "Ann"}, ANSWERED]}], NAMED)[0]
    assert byte_tokenizer().decode(named["input_ids"]) == "<user Ann>Rain?</><assistant>No.</>"
    for key in ("reasoning_content", "reasoning", "thinking"):
        rows = [{"messages": [ASKED, {**ANSWERED, key: "dry"}]}, {"prompt": "Rain?", "response": "No.", key: "dry"}]
        for row in rows:
            assert learned(encode([row], templates.QWEN_3)[0]) == "<think>\ndry\n</think>\n\nNo.<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "template", "problem"),
    [
        ({"messages": [ASKED, ANSWERED], "tools": TOOLS}, "PLAIN_END", "does not write column 'tools'"),
        ({"messages": [ASKED, CALL, RESULT, ANSWERED]}, "PLAIN_END", "does not write 'tool_calls' of message 2"),
        ({"messages": [ASKED, {**CALL, "content": "So:"}]}, "LLAMA_3", "does not write 'content' of message 2"),
        (
            {"messages": [ASKED, {**CALL, "tool_calls": CALL["tool_calls"] * 2}]},
            "LLAMA_3",
            "does not write 'tool_calls' of message 2",
        ),
        ({"messages": [{**ASKED, "name": "Ann"}, ANSWERED]}, "CHATML", "does not write 'name' of message 1"),
        (
            {"messages": [ASKED, {**ANSWERED, "reasoning_content": "dry"}]},
            "CHATML",
            "does not write 'reasoning_content' of message 2",
        ),
        ({"messages": [ASKED, {**ANSWERED, "refusal": "I won't"}]}, "CHATML", "does not write 'refusal' of message 2"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0.5}]}, "CHATML", "message 2 has 'weight': 0.5, but 0 or 1 was"),
        ({"messages": [{**ASKED, "weight": 1}, ANSWERED]}, "CHATML", "only messages of the assistant are learned"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "CHATML",
            "it holds images, and a causal-lm",
        ),
        (
            {"messages": [ASKED, ANSWERED], "images": ["x"]},
            "CHATML",
            "it holds images, and a causal-lm",
        ),
        ({"messages": [{"role": "system", "content": "t"}, ASKED, ANSWERED], "system": "s"}, "CHATML", "two different"),
        ({"messages": [ASKED, ANSWERED], "tools": "none"}, "CHATML", "column 'tools' .* neither a list nor JSON"),
        ({"messages": [{"role": "user", "content": 5}]}, "CHATML", "a role and a content that is text"),
        ({"messages": [ASKED, {"role": "function", "content": "dry"}, ANSWERED]}, "ROLES", "'content' of message 2"),
        (
            {"prompt": [ASKED], "completion": [ANSWERED], "input": "x"},
            "CHATML",
            "column 'input' stands beside a prompt",
        ),
        ({"prompt": [ASKED], "completion": [5]}, "CHATML", "column 'completion' .* messages were expected"),
        ({"messages": "hello"}, "CHATML", "neither a list nor JSON"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "CHATML", "pairs of a prompt and an answer"),
    ],
)
def test_what_would_be_lost_is_refused(row: dict[str, Any], template: str, problem: str) -> None:
    with pytest.raises(OptionError, match=f"row 1: .*{problem}") as refused:
        encode([row], getattr(templates, template, ROLES))
    assert "--no-chat-template" not in str(refused.value)


def test_the_name_of_a_tool_may_be_repeated() -> None:
    rows = [{"messages": [ASKED, CALL, {**RESULT, "name": "rain", "tool_call_id": "1"}, ANSWERED]}]
    assert "dry" in byte_tokenizer().decode(encode(rows)[0]["input_ids"])
    rows[0]["messages"][2]["name"] = "snow"
    with pytest.raises(OptionError, match=r"row 1: .*'name' of message 3"):
        encode(rows)


def test_a_single_turn_needs_no_template(caplog: pytest.LogCaptureFixture) -> None:
    """Without one, it is a prompt and its answer; several turns and calls are refused for what they are."""
    pair = encode([{"prompt": "s\nRain?", "response": "No."}], None)[0]
    row = {"messages": [{"role": "system", "content": "s"}, {**ASKED, "id": "4"}, ANSWERED]}
    for template, option in ((None, None), (templates.CHATML, False)):
        assert encode([row], template, chat_template=option)[0] == pair
        alpaca = {"instruction": "Rain?", "output": "No.", "system": "s"}
        assert encode([alpaca], template, chat_template=option)[0] == pair
    for lost in (
        {"messages": [ASKED, ANSWERED, ASKED, ANSWERED]},
        {"messages": [ASKED, CALL]},
        {"messages": [ASKED, ANSWERED], "tools": TOOLS},
        {"prompt": "a", "response": "b", "history": [["c", "d"]]},
    ):
        with pytest.raises(
            OptionError, match=r"row 1: only a chat template can write .* tokenizer has none: use a chat model"
        ):
            encode([lost], None)
        with pytest.raises(OptionError, match=r"row 1: only a chat template can write .* is set: leave the option out"):
            encode([lost], chat_template=False)
    for lost, problem in (([ASKED], "does not end"), ([ANSWERED], "a single message"), ([], "does not end")):
        for template in (None, templates.CHATML):
            with pytest.raises(OptionError, match=f"row 2: .*{problem}"):
                encode([{"messages": [ASKED, ANSWERED]}, {"messages": lost}], template)
    weighted = [{"messages": [ASKED, {**ANSWERED, "weight": weight}]} for weight in (0, 1)]
    assert len(encode(weighted, None)) == 1
    assert "1 of 2 examples are left out" in caplog.text
