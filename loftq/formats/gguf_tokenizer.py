"""The metadata of a tokenizer in a GGUF file, from its `tokenizer.json`: tokens, types, merges or scores, special ids.

Two kinds of byte-pair encoding are supported. The file names them after the first models that had them:

    gpt2    on bytes that are spelled as letters. The merges are copied. Before that, text is split in a way that has a
            name in llama.cpp (SPLITS), which is looked up by the regular expression of the tokenizer.
    llama   on characters, with tokens for bytes (SentencePiece). A reader of the file joins any two tokens whose union
            is a token, and starts with the union of the highest score. The score is minus the rank of the first merge
            that makes the token. The result is the same if all such pairs are merges, and if the merges that make the
            same token follow each other. Tokenizers that were converted from SentencePiece fulfil that; others are
            refused.

The vocabulary is filled up to the number of rows of the embedding with tokens of type UNUSED.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from itertools import pairwise
from pathlib import Path
from typing import Any

from loftq.errors import OptionError
from loftq.formats.schema import Limited, check_value, read_json, whole

FILE = "tokenizer.json"
_STEP: dict[str, Any] = {"type": str, "pattern?": {"Regex?": str, "String?": str}}
_STEP |= {"pretokenizers?": [_STEP], "normalizers?": [_STEP]}
_SCHEMA = {
    "model": {"type?": (str, None), "merges?": (list, None)},
    "pre_tokenizer?": (_STEP, None),
    "normalizer?": (_STEP, None),
    "added_tokens?": ([{"content": str, "id": whole(0, 2**31), "special": bool}], None),
}
_MERGE = Limited("a pair of texts", lambda v: _is_pair(v))
_BYTE_PAIRS = {"model": {"vocab": {str: whole(0, 2**31)}, "merges": [_MERGE]}}
SPACE = "▁"  # stands for a space in SentencePiece
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Names of ways to split text into words, by the regular expressions in tokenizer.json, or the types of its steps.
SPLITS: Mapping[str, str] = {
    "ByteLevel": "gpt-2",
    "Digits ByteLevel": "smollm",
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of a folder for a model of `vocab_size` tokens.

    Raises OptionError if there is no tokenizer.json, or if its kind is not supported.
    """
    import gguf

    file = folder / FILE
    if not file.is_file():
        raise OptionError(
            f"{folder} has no {FILE}, from which --to gguf-q4_1 takes the tokenizer: "
            "save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    source = read_json(file, _SCHEMA, error=OptionError, foreign=True)
    kind = _kind(source, file)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(_split(source, file) if kind == "gpt2" else "default")
    tokens = _tokens(source, vocab_size, file)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([gguf.TokenType[name] for _, name in tokens])
    if kind == "llama":
        writer.add_token_scores(_scores(source, [token for token, _ in tokens], file))
        writer.add_add_space_prefix(_prefixes_space(source))
    special = gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=vocab_size)
    special.add_special_token = {"bos": False, "eos": False} | special.add_special_token
    special.add_to_gguf(writer, quiet=True)


def _kind(source: Mapping[str, Any], file: Path) -> str:
    model = source["model"]
    parts = [part["type"] for part in _parts(source.get("pre_tokenizer"))]
    if model.get("type") == "BPE" and model.get("merges"):
        check_value(source, _BYTE_PAIRS, file, error=OptionError)
        if model.get("byte_fallback"):
            return "llama"
        if "ByteLevel" in parts:
            return "gpt2"
    raise OptionError(
        f"{file}: --to gguf-q4_1 supports byte-pair encodings with merges, on bytes or with byte_fallback, "
        f"not {model.get('type')} with {len(model.get('merges') or ())} merges: use --to mlx"
    )


def _split(source: Mapping[str, Any], file: Path) -> str:
    parts = _parts(source["pre_tokenizer"])
    patterns = [part["pattern"].get("Regex") or part["pattern"].get("String") for part in parts if "pattern" in part]
    key = " | ".join(patterns) if patterns else " ".join(part["type"] for part in parts)
    if key not in SPLITS:
        raise OptionError(
            f"{file}: --to gguf-q4_1 does not support the way in which this tokenizer splits text ({key}; "
            f"supported are those of {', '.join(SPLITS.values())}): use --to mlx"
        )
    return SPLITS[key]


def _tokens(source: Mapping[str, Any], vocab_size: int, file: Path) -> list[tuple[str, str]]:
    """Each token and the name of its type, in the order of the token ids."""
    model = source["model"]
    tokens = {index: (token, _type(token, model)) for token, index in model["vocab"].items()}
    for added in source.get("added_tokens") or ():
        text, index = added["content"], added["id"]
        if tokens.get(index, ("", ""))[1] != "UNKNOWN":
            control = bool(added["special"])
            spaced = text if control else text.replace(SPACE, " ")
            tokens[index] = (spaced, "CONTROL" if control else "USER_DEFINED")
    if max(tokens) >= vocab_size:
        raise OptionError(
            f"{file} has tokens up to id {max(tokens)}, but the embedding of the model has {vocab_size} rows: "
            "use the tokenizer that belongs to the model"
        )
    return [tokens.get(index, (f"[PAD{index}]", "UNUSED")) for index in range(vocab_size)]


def _type(token: str, model: Mapping[str, Any]) -> str:
    if token == model.get("unk_token"):
        return "UNKNOWN"
    is_byte = model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
    return "BYTE" if is_byte else "NORMAL"


def _scores(source: Mapping[str, Any], tokens: list[str], file: Path) -> list[float]:
    """The score of each token: minus the rank of the first merge that makes it. Tokens without a merge come last."""
    merges = [_pair(merge) for merge in source["model"]["merges"]]
    merged = ["".join(pair) for pair in merges]
    ranks: dict[str, int] = {}
    for rank, token in enumerate(merged):
        ranks.setdefault(token, rank)
    separated = [token for before, token in pairwise(merged) if ranks[before] > ranks[token]]
    wrong = separated + _not_merged(ranks, source["model"]["vocab"], set(merges))
    if wrong:
        raise OptionError(
            f"{file}: the merges that make {wrong[0]!r} are not those of SentencePiece, "
            "which --to gguf-q4_1 needs: use --to mlx"
        )
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _not_merged(merged: Iterable[str], vocab: Mapping[str, int], merges: Set[tuple[str, str]]) -> list[str]:
    """The merged tokens that a pair of tokens without a merge would make too."""
    cuts = ((token, token[:i], token[i:]) for token in merged for i in range(1, len(token)))
    return [token for token, left, right in cuts if left in vocab and right in vocab and (left, right) not in merges]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _is_pair(merge: Any) -> bool:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)


def _prefixes_space(source: Mapping[str, Any]) -> bool:
    parts = _parts(source.get("normalizer")) + _parts(source.get("pre_tokenizer"))
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def _parts(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in their order, with nested sequences expanded."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    nested = step.get("pretokenizers") or step.get("normalizers") or ()
    return [part for inner in nested for part in _parts(inner)]
