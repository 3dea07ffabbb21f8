"""Small tokenizers with merges, of the kinds that models have."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over 13 lazy dogs, isn't it?\n\n  Ünïcode — 1234567 ways; and 'quoted' words…"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REGEXES = {"qwen2": rf"{_WORDS}|\p{{N}}{_REST}", "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}"}
_MERGED = ["{}the", "{}over", "{}brown", "n't", "wo", "123", "23", "45", "{}1", "ow", "wn", "{}'", "ed", "..", "{}{}"]


def byte_level(split: str) -> PreTrainedTokenizerFast:
    """Byte-pair encoding on bytes, of a split by its name; llama-bpe puts a token in front."""
    vocab, merges = _learned(sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=split == "llama-bpe"))
    if split in REGEXES:
        cut = pre_tokenizers.Split(Regex(REGEXES[split]), behavior="isolated")
        steps = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return _dressed(tokenizer, ["<|begin|>", "<|end|>"], bos=split == "llama-bpe")


def sentence_piece() -> PreTrainedTokenizerFast:
    """Byte-pair encoding on characters with tokens for bytes, as Llama 2 and Mistral have it."""
    symbols = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz0123456789.'",
    ]
    vocab, merges = _learned(symbols, "▁")
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _dressed(tokenizer, ["<s>", "</s>", "<unk>"], bos=True)


def _learned(symbols: Iterable[str], space: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary, and the merges that make its tokens from each pair of others, as SentencePiece has them."""
    vocab = {token: i for i, token in enumerate(symbols)}
    count = len(vocab)
    for text in (word.replace("{}", space) for word in _MERGED):
        for end in range(2, len(text) + 1):
            vocab.setdefault(text[:end], len(vocab))
    cuts = [(token[:i], token[i:]) for token in list(vocab)[count:] for i in range(1, len(token))]
    merges = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
    return vocab, merges


def _dressed(tokenizer: Tokenizer, special: list[str], *, bos: bool) -> PreTrainedTokenizerFast:
    """With special tokens, one that is not special, and a chat template."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    if bos:
        first = (special[0], tokenizer.token_to_id(special[0]))
        tokenizer.post_processor = processors.TemplateProcessing(f"{special[0]} $A", f"{special[0]} $A $B", [first])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    fast.chat_template = TEMPLATE
    return fast


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """As `sentence_piece`, where a space is put in front `first`, `always` or `never`, or as older files do it."""
    tokenizer = sentence_piece()
    inner = tokenizer.backend_tokenizer
    if scheme in ("legacy", "gemma"):
        inner.pre_tokenizer = None
        spaces = normalizers.Replace(" ", "▁")
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if scheme == "legacy" else spaces
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def word_piece() -> PreTrainedTokenizerFast:
    """Words in small letters, as BERT has them; white space is dropped."""
    words = ["[UNK]", "<s>", "</s>", "the", "fox", "over", "it", "##s", "13", ",", "'", "assistant", "user", "<", ">"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python, which knows no places of its tokens: pairs of characters, from the beginning of a text."""

    def __init__(self, **options: object) -> None:
        self._ids: dict[str, int] = {"</s>": 0}
        super().__init__(eos_token="</s>", **options)

    @property
    def vocab_size(self) -> int:
        """The number of pairs that were seen."""
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        """The pairs that were seen."""
        return dict(self._ids)

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.setdefault(token, len(self._ids))

    def _convert_id_to_token(self, index: int) -> str:
        return list(self._ids)[index]
