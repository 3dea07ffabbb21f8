"""Text to calibrate on: what is read, how it is cut into windows, and what is refused. The oracle is the text."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from hub import Hub, datasets_of, serve
from picos import save_pico
from transformers import PreTrainedTokenizerFast

from loftq.calibration import windows
from loftq.calibration.windows import prepare
from loftq.errors import OptionError, SourceError
from loftq.hub.source import find_source
from loftq.hub.text import DEFAULT, read_text
from loftq.models import long_texts
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of

END = 257  # of the byte tokenizer
DOCUMENTS = [f"Document {i}: " + " ".join(str(i * j) for j in range(1, 20 * i)) for i in range(30)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MIN_TOKENS", 256)


@pytest.fixture(scope="module")
def plan(pico: Path) -> Plan:
    return make_plan(find_source(str(pico)), recipe_of(rank=4))


def plan_with(
    tokenizer: PreTrainedTokenizerFast | None, folder: Path, family: str = "llama", task: str = "causal-lm"
) -> Plan:
    """A pico model's plan with another tokenizer."""
    save_pico(family, task, folder)
    for path in folder.glob("*token*"):
        path.unlink()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return make_plan(find_source(str(folder)), recipe_of(rank=4))


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return str(path)


# What is read


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n\ntwo é\n", encoding="utf-8")
    assert list(read_text(str(tmp_path / "t.txt"))) == ["one\n\ntwo é\n"]


@pytest.mark.parametrize("form", ["jsonl", "json", "array"])
@pytest.mark.parametrize("column", ["text", "content"])
def test_rows_are_documents(form: str, column: str, tmp_path: Path) -> None:
    rows = [{"id": i, column: text} for i, text in enumerate(["one", "two\u2028lines", ""])]
    if column == "text":
        rows = [{"title": "t", **row} for row in rows]
    path = tmp_path / f"t.{form.replace('array', 'json')}"
    if form == "array":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert list(read_text(str(path))) == ["one", "two\u2028lines", ""]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"a": "x", "b": "y"}], r"expected a column `text`, or a single column of strings \(columns: a, b\)"),
        ([{"a": 1}], r"columns: a\)"),
        ([{"text": "x"}, {"text": None}], "row 2 has no string in its column 'text'"),
        (["x"], "line 1 is not an object"),
    ],
)
def test_rows_without_a_text_are_refused(rows: list[Any], match: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", rows)
    with pytest.raises(OptionError, match=f"--calibration {path}: .*{match}"):
        list(read_text(path))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("gone.txt", None, "no such file"),
        ("t.csv", b"a,b", r"expected a \.txt, \.jsonl or \.json file"),
        ("t.txt", b"\xff\xfe", "cannot be read as UTF-8 text"),
        ("t.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("t.json", b'[{"text": "x"}, ', "not JSON"),
        ("a/b/c", None, "no such file, and not the name of a data set on the Hub"),
    ],
)
def test_files_that_cannot_be_read_are_refused(name: str, content: bytes | None, match: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=f"--calibration {tmp_path / name}: .*{match}"):
        list(read_text(str(tmp_path / name)))


def test_a_data_set_streams_as_far_as_it_is_needed(plan: Plan, tmp_path: Path) -> None:
    rows = [{"text": f"{i} " * 500} for i in range(10, 30)]  # with the end, 1501 tokens
    (tmp_path / "set").mkdir()
    for i, row in enumerate(rows):
        lines(tmp_path / "set" / f"train-{i:05}-of-{len(rows):05}.jsonl", [row])
    with serve(Hub()) as hub, datasets_of(hub.endpoint, tmp_path / "hf"):
        hub.add("datasets/user/set", tmp_path / "set")
        calibration = prepare(plan, "user/set", tokens=256, sequence_length=64)
    whole = prepare(plan, lines(tmp_path / "t.jsonl", rows), tokens=256, sequence_length=64)
    assert torch.equal(calibration.windows, whole.windows)
    assert calibration.text_sha256 == whole.text_sha256
    read = {r.path.rpartition("/")[2] for r in hub.requests if r.method == "GET" and r.path.endswith(".jsonl")}
    assert read == {f"train-{i:05}-of-00020.jsonl" for i in range(3)}  # 16 * 256 tokens


def test_without_its_library_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OptionError, match=r"--calibration user/set: no such file; .* pip install 'loftq\[data\]'"):
        list(read_text("user/set"))


def test_the_shipped_text_is_enough_and_its_origin_is_told() -> None:
    documents = list(read_text(DEFAULT))
    assert len(documents) > 20
    assert 350_000 < sum(map(len, documents)) < 450_000
    assert not [text for text in documents if "gutenberg" in text.lower() or not text.strip()]
    notice = resources.files("loftq.hub").joinpath("data/NOTICE").read_text(encoding="utf-8")
    assert all(word in notice for word in ("Austen", "public domain", "Python Software Foundation", "Jargon"))


# How it is cut


def test_windows_are_pieces_of_the_joined_text(plan: Plan, tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"text": text} for text in DOCUMENTS])
    encode = byte_tokenizer()
    stream = [token for text in DOCUMENTS for token in (*encode(text)["input_ids"], END)]
    found = {seed: prepare(plan, path, tokens=1000, sequence_length=100, seed=seed) for seed in (0, 1)}
    for calibration in found.values():
        assert calibration.windows.shape == (10, 100)
        assert (calibration.tokens, calibration.sequence_length, calibration.notes) == (1000, 100, ())
        starts = [i for i in range(0, len(stream), 100) if stream[i : i + 100] in calibration.windows.tolist()]
        assert len(starts) == 10
        assert calibration.windows.tolist() == [stream[i : i + 100] for i in starts]
    assert not torch.equal(found[0].windows, found[1].windows)
    again = prepare(plan, path, tokens=1000, sequence_length=100)
    assert torch.equal(again.windows, found[0].windows)
    assert again.key == found[0].key != found[1].key


def test_long_documents_are_tokenized_in_pieces(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("\n".join(DOCUMENTS))
    whole = prepare(plan, str(tmp_path / "t.txt"), tokens=4000, sequence_length=100)
    monkeypatch.setattr(long_texts, "PIECE", 500)  # shorter than some lines
    pieces = prepare(plan, str(tmp_path / "t.txt"), tokens=4000, sequence_length=100)
    assert torch.equal(whole.windows, pieces.windows)
    assert whole.text_sha256 == pieces.text_sha256


def test_windows_get_the_special_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> $B </s>", [("<s>", 256), ("</s>", 257)]
    )
    plan = plan_with(tokenizer, tmp_path / "bert", "bert", "masked-lm")
    windows = prepare(plan, tokens=512, sequence_length=64).windows
    assert windows.shape == (8, 64)
    assert windows[:, 0].tolist() == [256] * 8
    assert windows[:, -1].tolist() == [257] * 8
    assert not windows[:, 1:-1].eq(256).any()


@pytest.mark.parametrize(("family", "task"), [("llama", "causal-lm"), ("roberta", "masked-lm")])
def test_windows_are_as_long_as_the_model_takes(family: str, task: str, tmp_path: Path) -> None:
    plan = plan_with(byte_tokenizer(), tmp_path / family, family, task)
    calibration = prepare(plan, tokens=2048, sequence_length=1024)
    assert calibration.sequence_length == 128  # of RoBERTa's 130 positions, two come before the first token
    assert calibration.notes == ("calibrated on windows of 128 tokens, the most that the model accepts",)


def test_a_tokenizer_may_say_how_long_they_are(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 48
    assert prepare(plan_with(tokenizer, tmp_path / "t"), tokens=512).sequence_length == 48


# What is refused


def test_a_short_text_is_noted_and_a_shorter_one_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 699)
    calibration = prepare(plan, str(tmp_path / "t.txt"), tokens=2048, sequence_length=100)
    assert calibration.windows.shape == (7, 100)
    assert calibration.notes == (
        "calibrated on 700 tokens instead of 2048: the text has 700 tokens, of which 700 fill whole windows of 100",
    )
    (tmp_path / "t.txt").write_text("x" * 99)
    match = "has 100 tokens, of which 100 fill whole .*: expected 256 .*a longer text, or .*--calibration default"
    with pytest.raises(OptionError, match=match):
        prepare(plan, str(tmp_path / "t.txt"))


def test_only_what_fills_windows_counts(plan: Plan, tmp_path: Path) -> None:
    """Oracle: the number of tokens, a byte each and one at the end; the model takes 128 at once."""
    (tmp_path / "t.txt").write_text("x" * 299)
    with pytest.raises(OptionError, match="has 300 tokens, of which 240 fill whole windows of 120: expected 256"):
        prepare(plan, str(tmp_path / "t.txt"), sequence_length=120)
    calibration = prepare(plan, tokens=511, sequence_length=128)
    assert calibration.tokens == 384
    assert calibration.notes == (
        "calibrated on 384 tokens instead of 511: 384 of 511 tokens fill whole windows of 128",
    )


def test_tokens_have_a_bound(plan: Plan) -> None:
    with pytest.raises(OptionError, match="--calibration-tokens 255: expected 256"):
        prepare(plan, tokens=255)


def test_a_model_needs_its_tokenizer(tmp_path: Path) -> None:
    plan = plan_with(None, tmp_path / "bare")
    with pytest.raises(SourceError, match=f"{tmp_path / 'bare'} has no tokenizer .*: copy the tokenizer's files"):
        prepare(plan)
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match=f"{tmp_path / 'bare'} has no tokenizer that can be loaded"):
        prepare(plan)


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(100)])
    tokenizer.add_tokens(["the"])  # is 358
    plan = plan_with(tokenizer, tmp_path / "model")
    match = r"produces the token \d+, but the last row of the model's embeddings is 319: it belongs to another model"
    with pytest.raises(SourceError, match=match):
        prepare(plan, tokens=512, sequence_length=64)
