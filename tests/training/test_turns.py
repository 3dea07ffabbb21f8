"""Which parts of a conversation are learned. Oracle: transformers' own rendering, and the answers written out.

Covers: loftq/models/message_keys.py.
"""

from __future__ import annotations

from typing import Any

import pico_templates as templates
import pytest
from conftest import byte_tokenizer
from pico_tokenizers import metaspace

from loftq.errors import OptionError
from loftq.training.encoding import IGNORED, Encoder
from loftq.training.turns import turns


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Bonn"}}}
TOOLS = [{"type": "function", "function": {"name": "rain"}}]
TWO = [user("q"), answer("one b"), user("r"), answer("c")]
CALLS = [
    user("q"),
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "no"},
    answer("Dry"),
    *TWO[2:],
]
REASONED = [user("q"), answer("b", reasoning_content="x"), user("r"), answer("c", reasoning_content="y")]
INLINE = [user("q"), answer("<think>\nx\n</think>\n\nb"), user("r"), answer("<think>\ny\n</think>\n\nc")]
WRITTEN_CALL = '{"name": "rain", "arguments": {"city": "Bonn"}}'

CASES: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "chatml": (templates.CHATML, TWO, ["one b<|im_end|>\n", "c<|im_end|>\n"]),
    "chatml, calls": (
        templates.CHATML,
        CALLS,
        [f"<call>{WRITTEN_CALL}</call><|im_end|>\n", "Dry<|im_end|>\n", "c<|im_end|>\n"],
    ),
    "chatml, assistant first": (templates.CHATML, [answer("hi"), *TWO], ["one b<|im_end|>\n", "c<|im_end|>\n"]),
    "llama 2": (templates.LLAMA_2, TWO, [" one b </s>", " c </s>"]),
    "llama 2, system": (templates.LLAMA_2, [{"role": "system", "content": "s"}, *TWO], [" one b </s>", " c </s>"]),
    "llama 3": (templates.LLAMA_3, [user(" q "), answer(" b\n"), *TWO[2:]], ["b<|eot|>", "c<|eot|>"]),
    "llama 3, calls": (templates.LLAMA_3, CALLS, [f"{WRITTEN_CALL}<|eot|>", "Dry<|eot|>", "c<|eot|>"]),
    "gemma": (templates.GEMMA, TWO, ["one b<end_of_turn>\n", "c<end_of_turn>\n"]),
    "phi 3": (templates.PHI_3, TWO, ["one b<|end|>", "c<|end|>\n</s>"]),
    "mistral": (templates.MISTRAL, CALLS, [f"[CALL][{str(CALL).replace(chr(39), chr(34))}]</s>", " Dry</s>", " c</s>"]),
    "qwen 3": (templates.QWEN_3, TWO, ["one b<|im_end|>\n", "<think>\n\n</think>\n\nc<|im_end|>\n"]),
    "qwen 3, reasoned": (templates.QWEN_3, REASONED, ["b<|im_end|>\n", "<think>\ny\n</think>\n\nc<|im_end|>\n"]),
    "qwen 3, inline": (templates.QWEN_3, INLINE, ["b<|im_end|>\n", "<think>\ny\n</think>\n\nc<|im_end|>\n"]),
    "thinking": (templates.THINKING, REASONED, ["b<|im_end|>\n", "y\n</think>\n\nc<|im_end|>\n"]),
    "thinking, inline": (templates.THINKING, INLINE, ["b<|im_end|>\n", "y\n</think>\n\nc<|im_end|>\n"]),
    "last end": (templates.LAST_END, TWO, ["one b", "c</s>"]),
    "marked": (templates.MARKED, TWO, ["one b<|im_end|>", "c<|im_end|>"]),
    "labelled": (templates.LABELLED, TWO, ["one b\n", "c\n"]),
    "no opening": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        TWO[:2],
        ["assistant: one b\n"],
    ),
    "same answer twice": (templates.CHATML, [*TWO[:2], *TWO[:2]], ["one b<|im_end|>\n"] * 2),
}


def with_template(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|end|>", "<end_of_turn>", "<|eot|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", CASES)
def test_answers_are_learned(name: str) -> None:
    template, messages, want = CASES[name]
    tokenizer = with_template(template)
    variables = {"tools": TOOLS} if messages is CALLS else {}
    pieces = turns(tokenizer, messages, variables)
    whole = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
    assert "".join(text for text, _ in pieces) == whole
    assert [text for text, learned in pieces if learned] == want
    example = Encoder(tokenizer, "causal-lm", 999).conversation(pieces)
    assert example["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False, **variables)
    assert tokenizer.decode([label for label in example["labels"] if label != IGNORED]) == "".join(want)


def test_some_answers_are_learned() -> None:
    for template in (templates.CHATML, templates.MARKED, templates.QWEN_3):
        pieces = turns(with_template(template), TWO, {}, [True, False, True, True])
        learned = [text for text, learns in pieces if learns]
        assert len(learned) == 1
        assert "c<|im_end|>" in learned[0]
        assert not any(learns for _, learns in turns(with_template(template), TWO, {}, [False] * 4))


def test_marks_are_those_of_transformers() -> None:
    tokenizer = with_template(templates.MARKED)
    example = Encoder(tokenizer, "causal-lm", 999).conversation(turns(tokenizer, TWO))
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    mask = tokenizer.apply_chat_template(TWO, **options)["assistant_masks"]
    assert [int(label != IGNORED) for label in example["labels"]] == mask


@pytest.mark.parametrize("scheme", ["first", "always", "legacy", "gemma"])
@pytest.mark.parametrize(
    "template", [templates.CHATML, templates.LLAMA_2, templates.PHI_3], ids=["chatml", "llama", "phi"]
)
def test_no_token_is_added_to_an_answer(template: str, scheme: str) -> None:
    """Oracle: what transformers makes of the conversation, and of what is asked."""
    tokenizer = metaspace(scheme)
    tokenizer.chat_template = template
    example = Encoder(tokenizer, "causal-lm", 999).conversation(turns(tokenizer, TWO))
    assert example["input_ids"] == tokenizer.apply_chat_template(TWO, return_dict=False)
    asked = Encoder(tokenizer, "causal-lm", 999).templated(TWO[:-1], 1)
    assert asked == tokenizer.apply_chat_template(TWO[:-1], add_generation_prompt=True, return_dict=False)
    assert example["input_ids"][: len(asked)] == asked
    assert example["labels"][len(asked) - 1] == IGNORED
    assert example["labels"][len(asked) :] == example["input_ids"][len(asked) :]


THINKS = templates.EOS_END.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (templates.CHATML, TWO[:3], "does not end with a message of the assistant: remove its messages after"),
        (templates.CHATML, TWO[:1], "does not end with a message of the assistant: remove it, or"),
        (templates.CHATML, [answer("hi")], "a single message, which answers nothing"),
        (templates.LLAMA_2, [answer("hi"), *TWO], "refuses a conversation .*roles must alternate: correct the conv"),
        (templates.GEMMA, [{"role": "system", "content": "s"}, *TWO], "System role not supported: correct the conv"),
        ("{{ messages | length }}", TWO, "cannot be found: correct the template"),
        (
            THINKS,
            TWO,
            "begins an answer with '<think>' in a prompt .*: begin the content .* with it, or use a template",
        ),
        (
            THINKS,
            TWO[:2],
            "begins an answer with '<think>' in a prompt .*: add --no-chat-template, or begin the content",
        ),
    ],
)
def test_what_cannot_be_learned_is_explained(template: str, messages: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(OptionError, match=problem) as refused:
        turns(with_template(template), messages)
    assert ("--no-chat-template" in str(refused.value)) == (messages == TWO[:2])


def test_the_advice_works() -> None:
    begun = [*TWO[:3], answer("<think>c")]
    assert turns(with_template(THINKS), begun)[-1] == ("c</s>", True)
