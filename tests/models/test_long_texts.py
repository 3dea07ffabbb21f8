"""Long texts in pieces. Oracle: the tokenizer on the whole text at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import byte_tokenizer
from pico_tokenizers import TEXT, byte_level, sentence_piece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loftq.models import long_texts
from loftq.models.long_texts import tokenized_pieces


def word_piece() -> Any:
    """As BERT has it: no tokens for spaces, one for a long word."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'"
    vocab = {token: i for i, token in enumerate(["[UNK]", *letters, *(f"##{one}" for one in letters), "the", "##ow"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def unigram() -> Any:
    """As T5 has it, with a prefix before each text; several spaces are one."""
    pieces = [("<unk>", 0.0), *((one, -5.0) for one in "▁abcdefghijklmnopqrstuvwxyz0123456789.,'\n")]
    pieces += [("▁the", -3.0), ("ow", -4.0), ("▁b", -4.5), ("aa", -4.0), ("aaa", -5.5), ("over", -6.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def stripping() -> Any:
    """One that removes the space around a text, and joins spaces inside of it."""
    tokenizer = byte_level("gpt2")
    tokenizer._tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.NFC()])
    return tokenizer


class Slow:
    """A tokenizer without offsets: it counts the words, and joins doubled letters from the left."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert not options["add_special_tokens"]
        ids: list[int] = []
        for one in f" {text}":
            twice = bool(ids) and ids[-1] == ord(one)
            ids[-1:] = [2_000_000 + ord(one)] if twice else [*ids[-1:], ord(one)]
        return {"input_ids": ids}


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer,
    "gpt2": lambda: byte_level("gpt2"),
    "qwen2": lambda: byte_level("qwen2"),
    "llama-bpe": lambda: byte_level("llama-bpe"),
    "smollm": lambda: byte_level("smollm"),
    "sentence_piece": sentence_piece,
    "word_piece": word_piece,
    "unigram": unigram,
    "stripping": stripping,
    "slow": Slow,
}
WORDS = [*TEXT.split(), "the", "over", "  ", "\n", "\n\n", "\t", "<think>", "<|end|>"]
WORDS += ["日本語", "e\u0301", "\U0001f600", "\u2028"]


def whole(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def texts(seed: int) -> list[str]:
    """Texts of words, of lines, without any space, of one letter, of spaces alone, and with very long words."""
    dice = random.Random(seed)
    words = [dice.choice(WORDS) for _ in range(800)]
    return [
        " ".join(words),
        "\r\n".join(words),
        "".join(words).replace(" ", ""),
        "".join(dice.choice("abtheovrw") for _ in range(2500)),
        f"{'x' * dice.randrange(9)}{'a' * 3000}",
        " " * 2500,
        f"the{' ' * 2500}over",
        "\n" * 2500,
        " ".join("a" * dice.randrange(400) for _ in range(12)),
        " the over" * 300,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_of_the_whole_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE", 500)
    monkeypatch.setattr(long_texts, "_CONTEXT", 128)
    tokenizer = KINDS[kind]()
    cut = 0
    for seed in range(2):
        for text in texts(seed):
            pieces = list(tokenized_pieces(tokenizer, text))
            assert "".join(piece for piece, _ in pieces) == text
            assert [one for _, ids in pieces for one in ids] == whole(tokenizer, text), text[:60]
            cut += len(pieces) > 1
    assert cut > 10  # of 20
