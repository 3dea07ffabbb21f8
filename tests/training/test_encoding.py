"""Examples. Oracle: what the tokens decode to, and transformers' own tokenizers.

Covers: loftq/training/tasks/gsm8k.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, pico_llama
from datasets import Dataset
from rows import problems, sums
from tokenizers.processors import TemplateProcessing

from loftq.errors import OptionError
from loftq.training.collators import Collator
from loftq.training.encoding import IGNORED, Encoder, load_tokenizer
from loftq.training.labels import Labels
from loftq.training.tasks import TRAINING_TASKS
from loftq.training.tasks.gsm8k import final_number

TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    found = byte_tokenizer()
    found.chat_template = TURNS
    return found


def learned(tokenizer: Any, example: dict[str, list[int]]) -> str:
    """The text that has a loss; every other token must be where it is in the input."""
    ids, labels = example["input_ids"], example["labels"]
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


def test_text_is_packed_without_loss(tokenizer: Any) -> None:
    rows = Dataset.from_list([{"text": "abcdefgh"}, {"text": "ijklm"}])
    blocks = TRAINING_TASKS["clm"].encode(rows, {}, Encoder(tokenizer, "causal-lm", 4))
    assert all(len(ids) == 4 for ids in blocks["input_ids"])
    assert blocks["labels"][:] == blocks["input_ids"][:]
    joined = tokenizer.decode([token for ids in blocks["input_ids"] for token in ids])
    assert joined == "abcdefgh</s>ijk"  # 15 tokens, of which the last three are no block
    short = TRAINING_TASKS["clm"].encode(Dataset.from_list([{"text": "ab"}]), {}, Encoder(tokenizer, "causal-lm", 64))
    assert tokenizer.decode(short["input_ids"][0]) == "ab</s>"


@pytest.mark.parametrize("ends", [True, False])
def test_no_text_is_nothing_to_learn(ends: bool, tokenizer: Any) -> None:
    if not ends:
        tokenizer.eos_token = None
    for texts in ([""], ["", ""], *([] if ends else [["a"]])):
        with pytest.raises(OptionError, match="column 'text' of the data holds no text to learn from"):
            TRAINING_TASKS["clm"].encode(
                Dataset.from_list([{"text": text} for text in texts]), {}, Encoder(tokenizer, "causal-lm", 64)
            )


def test_the_answer_alone_is_learned(tokenizer: Any) -> None:
    plain = TRAINING_TASKS["sft"].encode(
        Dataset.from_list(sums(3)), {}, Encoder(tokenizer, "causal-lm", 64, chat_template=False)
    )
    assert learned(tokenizer, plain[2]) == "It is 4.</s>"
    assert tokenizer.decode(plain[2]["input_ids"]) == "What is 2+2?\nIt is 4.</s>"
    chat = TRAINING_TASKS["sft"].encode(Dataset.from_list(sums(3)), {}, Encoder(tokenizer, "causal-lm", 64))
    assert tokenizer.decode(chat[2]["input_ids"]) == "<user>What is 2+2?</><assistant>It is 4.</>"
    assert learned(tokenizer, chat[2]) == "It is 4.</>"


def test_every_answer_of_a_conversation_is_learned(tokenizer: Any) -> None:
    talk = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]}]
    rows_of_share_gpt = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    found = TRAINING_TASKS["sft"].encode(Dataset.from_list(rows), {}, Encoder(tokenizer, "causal-lm", 128))
    assert learned(tokenizer, found[0]) == "b</>d</>"
    found = TRAINING_TASKS["sft"].encode(Dataset.from_list(rows_of_share_gpt), {}, Encoder(tokenizer, "causal-lm", 128))
    assert learned(tokenizer, found[0]) == "b</>"


def test_limits_cut_the_prompt_before_the_answer(tokenizer: Any) -> None:
    rows = Dataset.from_list([{"question": "0123456789", "answer": "#### 7"}])
    found = TRAINING_TASKS["gsm8k"].encode(rows, {}, Encoder(tokenizer, "causal-lm", 24, max_source_length=12))
    assert tokenizer.decode(found[0]["input_ids"]) == "6789\nAnswer:"[-12:] + " #### 7</s>"
    found = TRAINING_TASKS["gsm8k"].encode(rows, {}, Encoder(tokenizer, "causal-lm", 64, max_target_length=3))
    assert learned(tokenizer, found[0]) == " ##"
    talk = [{"role": "user", "content": "x" * 99}, {"role": "assistant", "content": "y"}]
    long = Dataset.from_list([{"messages": talk}])
    with pytest.raises(OptionError, match="no example has anything to learn"):
        TRAINING_TASKS["sft"].encode(long, {}, Encoder(tokenizer, "causal-lm", 32))


def test_a_prompt_and_its_answer_share_the_room(tokenizer: Any) -> None:
    """Neither takes all of it; what the answer leaves is the prompt's, of which the end stays, as when it is asked."""
    encoder = Encoder(tokenizer, "causal-lm", 64, chat_template=False)
    rows = [("P" * 6, "R" * 100), ("Q" * 90 + "END", "R" * 30), ("Q" * 90 + "END", "R" * 100)]
    found = TRAINING_TASKS["sft"].encode(
        Dataset.from_list([{"prompt": p, "response": r} for p, r in rows]), {}, encoder
    )
    texts = [tokenizer.decode(ids) for ids in found["input_ids"]]
    assert texts == [
        "PPPPPP\n" + "R" * 57,
        "Q" * 29 + "END\n" + "R" * 30 + "</s>",
        "Q" * 28 + "END\n" + "R" * 32,
    ]


@pytest.mark.parametrize("length", [20, 200, 500])
def test_a_long_document_leaves_its_cue(length: int, tokenizer: Any) -> None:
    rows = Dataset.from_list([{"document": "D" * 900, "summary": "S" * length}])
    example = TRAINING_TASKS["summarization"].encode(rows, {}, Encoder(tokenizer, "causal-lm", 512))[0]
    text = tokenizer.decode(example["input_ids"])
    assert text.startswith("DDDD")
    assert "D\n\nSummary: SSSS" in text
    assert 500 < len(example["input_ids"]) <= 512


def test_examples_beyond_the_limit_are_left_out(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    talk = [[{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}] for n in (1, 99, 2)]
    found = TRAINING_TASKS["sft"].encode(
        Dataset.from_list([{"messages": m} for m in talk]), {}, Encoder(tokenizer, "causal-lm", 48)
    )
    assert len(found) == 2
    assert "1 of 3 examples are left out" in caplog.text


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "assistant", "content": None}, "'content': None"),
        ({"role": "user", "content": "and then?"}, "does not end with a message of the assistant"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(message: dict[str, Any], problem: str, tokenizer: Any) -> None:
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = Dataset.from_list([{"messages": [asked, answered]}, {"messages": [asked, message]}])
    with pytest.raises(OptionError, match=rf"row 2: .*{problem}"):
        TRAINING_TASKS["sft"].encode(rows, {}, Encoder(tokenizer, "causal-lm", 64))


@pytest.mark.parametrize("limits", [{"max_source_length": 4}, {"max_target_length": 4}])
def test_a_conversation_has_one_limit(limits: dict[str, int], tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, "causal-lm", 64, chat_template=True, **limits)
    for task, rows in (("sft", sums(2)), ("gsm8k", problems(2))):
        with pytest.raises(OptionError, match=r"--max-.*--cutoff-len is the only limit"):
            TRAINING_TASKS[task].encode(Dataset.from_list(rows), {}, encoder)


def test_a_batch_is_padded_where_nothing_is_learned() -> None:
    batch = Collator(9)([{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    assert Collator(0)([{"input_ids": [1], "labels": 2}])["labels"].tolist() == [2]
    longer = Collator(9, 4)([{"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]}])
    assert longer["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]]
    assert longer["attention_mask"].tolist() == [[1] * 5 + [0] * 3]
    assert longer["labels"].tolist() == [[1, 2, 3, 4, 5] + [IGNORED] * 3]


def test_padding_never_resizes_embeddings(tmp_path: Path) -> None:
    """A tokenizer whose padding token lies behind the embeddings, as of Llama-2 with one added; and one without any."""
    model = pico_llama()
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(rows)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= rows
    tokenizer.save_pretrained(tmp_path / "behind")
    assert load_tokenizer(tmp_path / "behind", model).pad_token == "</s>"
    plain = byte_tokenizer()
    plain.pad_token = None
    plain.save_pretrained(tmp_path / "none")
    assert load_tokenizer(tmp_path / "none", model).pad_token == "</s>"
    plain.add_special_tokens({"additional_special_tokens": ["<|finetune_right_pad_id|>"]})
    plain.save_pretrained(tmp_path / "reserved")
    assert load_tokenizer(tmp_path / "reserved", model).pad_token == "<|finetune_right_pad_id|>"
    assert model.get_input_embeddings().weight.shape[0] == rows


def test_prompts_to_answer_are_those_that_were_learned(tokenizer: Any) -> None:
    from loftq.training.tasks import gsm8k

    encoder = Encoder(tokenizer, "causal-lm", 64)
    row = problems(1)[0]
    example = TRAINING_TASKS["gsm8k"].encode(Dataset.from_list([row]), {}, encoder)[0]
    asked = gsm8k.prompt(row["question"], encoder, 16)
    assert example["input_ids"][: len(asked)] == asked
    assert example["labels"][len(asked) - 1 : len(asked) + 1] == [IGNORED, example["input_ids"][len(asked)]]


@pytest.mark.parametrize("begin", ["<s>", ""])
def test_a_template_decides_how_a_prompt_begins(begin: str, tokenizer: Any) -> None:
    """Of a tokenizer that puts <s> before every text: what is asked begins as what was learned, and is never cut."""
    from loftq.training.tasks import gsm8k

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = begin + TURNS
    encoder = Encoder(tokenizer, "causal-lm", 64, chat_template=True)
    row = {"question": "1+1?", "answer": "#### 2"}
    example = TRAINING_TASKS["gsm8k"].encode(Dataset.from_list([row]), {}, encoder)[0]
    asked = gsm8k.prompt(row["question"], encoder, 16)
    assert tokenizer.decode(asked) == f"{begin}<user>1+1?</><assistant>"
    assert example["input_ids"][: len(asked)] == asked
    with pytest.raises(OptionError, match="lower --max-new-tokens"):
        gsm8k.prompt("9" * 40, encoder, 16)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so 3+4 = 7\n#### 7", "7"),
        ("#### 1,200.00 dollars, of 3", "1200"),
        ("the answer is $18.50.", "18.5"),
        ("#### -4", "-4"),
        ("first 3 then 5", "5"),
        ("no idea", None),
        ("#### none, but 6", "6"),
    ],
)
def test_the_final_number(answer: str, number: str | None) -> None:
    assert final_number(answer) == number


def test_labels_that_are_none(tokenizer: Any) -> None:
    rows = Dataset.from_list([{"text": "a", "label": 2}])
    encoder = Encoder(tokenizer, "sequence-classification", 16, labels=Labels(2))
    with pytest.raises(OptionError, match="holds 2, but a whole number from 0 to 1 was expected; quantize"):
        TRAINING_TASKS["classification"].encode(rows, {}, encoder)
    found = TRAINING_TASKS["classification"].encode(
        rows, {}, Encoder(tokenizer, "sequence-classification", 16, labels=Labels(1))
    )
    assert found[0]["labels"] == 2.0
    assert Collator(0)([found[0]])["labels"].dtype == torch.float32
