"""SHA-256 of every file that a set of tiny runs writes, to see that a change of the code changes no bytes.

    python benchmarks/fingerprints.py --write before.json     # on the commit to compare with
    python benchmarks/fingerprints.py --check before.json     # on the changed code, same machine and versions

The runs cover each layout, each method, each kind of adapter, a merge to each target, a training, and what `inspect`
and `verify` print as JSON. Wording is left out: model cards, notes, and, in a training's record, times. The bytes
depend on the machine and on library versions, so the two runs belong on one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from loftq_cli.main import main as loftq

_FOLDER = Path(tempfile.gettempdir()) / "loftq-fingerprints"  # adapter_config.json holds its path, so it is fixed
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_WORDING = {"notes", "all files"}  # the size of all files counts the card
_MEASURED = {"seconds", "memory_bytes", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
_MEASURED |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "total_flos"}
_SKIPPED = {"README.md", "training_args.bin"}
_CALIBRATED = ["--calibration", "text.txt", "--calibration-tokens", "4096", "--sequence-length", "64"]
# Options of `loftq quantize`, by the name of the folder that they make.
_QUANTIZED: dict[str, list[str]] = {
    "nf4": [],
    "nf4-double": ["--double-quant", "--alpha", "8", "--rslora", "--rank", "8"],
    "nf4-qlora": ["--iter", "0"],
    "nf4-float16": ["--compute-dtype", "float16", "--target-modules", "q_proj,v_proj", "--svd", "exact"],
    "nf3": ["--bits", "3", "--block-size", "32"],
    "nf2-first": ["--bits", "2.5", "--allocation", "first", "--max-shard-size", "40KB"],
    "nf-auto": ["--bits", "2.7"],
    "int8": ["--bits", "8"],
    "int8-groups": ["--bits", "8", "--group-size", "32", "--format", "loftq"],
    "int4-gptq": ["--quant-type", "int", "--format", "gptq"],
    "int3-symmetric": ["--bits", "3", "--quant-type", "int", "--zero-point", "symmetric", "--double-quant"],
    "qalora4": ["--adapter", "qalora", "--rank", "2", "--group-size", "32"],
    "qalora4-gptq": ["--adapter", "qalora", "--rank", "2", "--format", "gptq", "--group-size", "32"],
    "qalora2-calibrated": ["--adapter", "qalora", "--bits", "2", "--rank", "1", "--refine", "2", *_CALIBRATED],
    "nf4-qera": ["--method", "qera", *_CALIBRATED],
    "nf4-qera-approx": ["--method", "qera-approx", *_CALIBRATED],
    "nf2-cloq": ["--method", "cloq", "--bits", "2", *_CALIBRATED],
    "nf3-calibrated": ["--bits", "3", "--refine", "4", *_CALIBRATED],
    "nf4-scale-search": ["--scales", "search"],
}
_MERGED = {  # backbone, options of `loftq merge`
    "merged-bf16": ("nf4", ["--to", "bf16"]),
    "merged-int": ("qalora4", ["--to", "int"]),
    "merged-gptq": ("qalora4-gptq", ["--to", "gptq", "--allow-rounding"]),
    "merged-mlx": ("qalora4", ["--to", "mlx"]),
    "merged-gguf": ("qalora4", ["--to", "gguf-q4_1"]),
    "merged-lora": ("qalora4", ["--to", "lora"]),
}


def main() -> None:
    """Run everything, then write the hashes or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file for the hashes")
    parser.add_argument("--check", type=Path, help="hashes to compare with; exit code 1 if any differ")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = Path.cwd()
    shutil.rmtree(_FOLDER, ignore_errors=True)
    _FOLDER.mkdir()
    os.chdir(_FOLDER)
    try:
        hashes = fingerprints()
    finally:
        os.chdir(before)
    shutil.rmtree(_FOLDER)
    if options.write:
        options.write.write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n")
    print(f"{len(hashes)} files of {len({name.split('/')[0] for name in hashes})} runs")
    if options.check:
        recorded = json.loads(options.check.read_text())
        differing = sorted(name for name in {*recorded, *hashes} if recorded.get(name) != hashes.get(name))
        print("\n".join(differing) or "all of them agree")
        sys.exit(bool(differing))


def fingerprints() -> dict[str, str]:
    """Make all folders inside the working directory. Returns the hash of each file that the runs wrote."""
    _make_inputs()
    printed = {}
    for name, arguments in _QUANTIZED.items():
        model = "llama-sharded" if name == "nf4-double" else "llama"
        printed[name] = _run("quantize", model, "--output", name, "--json", "--quiet", "--device", "cpu", *arguments)
    _run("quantize", "bert", "--output", "bert-head", "--num-labels", "3", "--quiet", "--device", "cpu")
    for name, (backbone, arguments) in _MERGED.items():
        printed[name] = _run("merge", backbone, "--output", name, "--json", "--quiet", *arguments)
    train = ["--data", "rows.jsonl", "--batch-size", "2", "--max-steps", "3", "--cpu", "--dtype", "float32", "--quiet"]
    printed["trained"] = _run("train", "nf4", "--output", "trained", "--json", *train)
    printed["trained-qalora"] = _run("train", "qalora4", "--output", "trained-qalora", "--json", *train)
    printed["inspect"] = _run("inspect", "nf4", "--json")
    verified = json.loads(_run("verify", "nf3", "--source", "llama", "--json", "--quiet"))
    printed["verify"] = json.dumps({key: value for key, value in verified.items() if key != "bytes"})  # the card's too
    folders = [*_QUANTIZED, "bert-head", *_MERGED, "trained", "trained-qalora"]
    files = [path for name in folders for path in sorted(Path(name).rglob("*")) if path.is_file()]
    hashes = {str(path): _hash(path.name, path.read_bytes()) for path in files if path.name not in _SKIPPED}
    return hashes | {f"{name}/stdout": _hash("stdout.json", text.encode()) for name, text in printed.items()}


def _run(*arguments: str) -> str:
    """Run a command of loftq in this process. Returns what it printed."""
    print("loftq", *arguments[:4], file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        loftq(list(arguments))
    return printed.getvalue()


def _hash(name: str, data: bytes) -> str:
    if name.endswith(".json") and not name.startswith("tokenizer"):
        data = json.dumps(_plain(json.loads(data)), sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def _plain(value: Any) -> Any:
    """A JSON value without wording, times, and the hash of the card."""
    if isinstance(value, dict):
        dropped = _WORDING | _MEASURED | _SKIPPED
        return {key: _plain(entry) for key, entry in value.items() if key not in dropped}
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return sorted(value)  # peft writes target_modules in the order of a set
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _make_inputs() -> None:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2)).bfloat16()
    bert = BertForSequenceClassification(BertConfig(**_SIZES, num_labels=2)).bfloat16()
    tokenizer = _tokenizer()
    for name, model, size in (("llama", llama, "5GB"), ("llama-sharded", llama, "60KB"), ("bert", bert, "5GB")):
        model.save_pretrained(name, max_shard_size=size)
        tokenizer.save_pretrained(name)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "seven", "wizards", "box"]
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 24)) for i in range(1, 241)]
    Path("text.txt").write_text("\n\n".join(lines) + "\n")
    rows = [json.dumps({"prompt": line[:20], "completion": line[20:]}) for line in lines[:24]]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n")


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and two merges, which GGUF asks for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>", "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    )


if __name__ == "__main__":
    main()
