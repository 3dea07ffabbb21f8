"""The command lines that serve an artifact, for its card and, with the id of a repository, for `loftq push`.

They are made from the manifest alone. docs/serving.md says what each server needs besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq.models.tasks import CAUSAL

PLACE = "MODEL_DIR"  # in lines of a folder that is in no repository
BASE = "BASE"  # in lines of an adapter whose base has no name on the Hub
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank
_WHOLE = ("vllm serve {place}", "python -m sglang.launch_server --model-path {place}")
_GGUF = ("llama-server -m {file}", "ollama create my-model -f Modelfile")
_LINES: Mapping[str, tuple[str, ...]] = {
    "bf16": (*_WHOLE, "transformers serve {place}"),
    "compressed-tensors": _WHOLE,
    "gptq": (),  # servers read its whole zero-points only in some versions
    "int": (),
    "mlx": ("mlx_lm.server --model {place}",),
    "gguf": _GGUF,
    "gguf-q4_1": _GGUF[:1],
    "lora": (
        "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules mine={place}",
        "python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths mine={place}",
    ),
    "mlx-lora": ("mlx_lm.server --model {base} --adapter-path {place}",),
    "gguf-lora": ("llama-server -m {base}.gguf --lora {file}",),
    "nf4": ("vllm serve {place} --enable-lora --max-lora-rank {rank} --lora-modules start={place}/loftq_init",),
}
_FROM_THE_HUB: Mapping[str, tuple[str, ...]] = {  # where a server takes the id of a repository for a file
    "gguf": ("llama-server -hf {place}", "ollama run hf.co/{place}"),
    "gguf-q4_1": ("llama-server -hf {place}",),
}
_NEED_A_FOLDER = ("mlx-lora", "gguf-lora", "nf4")  # what is read from a folder alone


def serving_section(manifest: Mapping[str, Any], repo_id: str | None = None, revision: str | None = None) -> str:
    """The part of a card about serving: command lines, and what they leave open. Empty where there is no server."""
    lines = serving_lines(manifest, repo_id, revision)
    if not lines:
        return ""
    notes = []
    if any(PLACE in line for line in lines):
        notes.append(f"`{PLACE}` is this folder.")
    if any(f" {BASE}" in line for line in lines):
        notes.append(f"`{BASE}` is {_base(manifest['source'])}.")
    told = "\n\n" + " ".join(notes) if notes else ""
    return "To serve it, one of:\n\n```\n" + "\n".join(lines) + f"\n```{told}"


def serving_lines(
    manifest: Mapping[str, Any], repo_id: str | None = None, revision: str | None = None
) -> tuple[str, ...]:
    """The command lines that serve what a manifest describes, each for another server; empty where there is none.

    A branch of a repository, and what servers read from folders alone, is downloaded first.
    """
    source = manifest.get("source", {})
    target = source.get("target") or _start(manifest)
    if not _LINES.get(target) or source.get("task", CAUSAL[0]) not in CAUSAL:
        return ()
    fields = {
        "place": repo_id or PLACE,
        "file": next((name for name in manifest.get("files", ()) if name.endswith(".gguf")), "FILE.gguf"),
        "base": BASE if target == "gguf-lora" or _is_pooled(source) else source.get("base") or BASE,
        "rank": vllm_rank(int(source.get("rank") or manifest["recipe"].get("rank") or 16)),
    }
    if repo_id is None:
        return tuple(line.format(**fields) for line in _LINES[target])
    if revision is None and target not in _NEED_A_FOLDER:
        return tuple(line.format(**fields) for line in _FROM_THE_HUB.get(target, _LINES[target]))
    fields["place"] = folder = repo_id.rpartition("/")[2]
    fields["file"] = f"{folder}/{fields['file']}"
    branch = f" --revision {revision}" if revision else ""
    download = f"hf download {repo_id}{branch} --local-dir {folder}"
    lines = (line.replace("-f Modelfile", f"-f {folder}/Modelfile") for line in _LINES[target])
    return (download, *(line.format(**fields) for line in lines))


def vllm_rank(rank: int) -> int:
    """The least value of vLLM's --max-lora-rank that holds a rank; the rank itself if none does."""
    return next((most for most in VLLM_RANKS if most >= rank), rank)


def _is_pooled(source: Mapping[str, Any]) -> bool:
    return str(source.get("adapter")).startswith("QA-LoRA")


def _base(source: Mapping[str, Any]) -> str:
    """The model that an adapter belongs to, in words."""
    file = "a GGUF file of " if source["target"] == "gguf-lora" else ""
    if _is_pooled(source):
        return f"{file}the backbone {source['model']}, exported without rounding it again"
    return f"{file}{source.get('base') or 'the full-precision model that ' + source['model'] + ' was made from'}"


def _start(manifest: Mapping[str, Any]) -> str:
    """The name in `_LINES` of a folder that `loftq quantize` wrote; empty if servers do not read it."""
    stock = manifest["kind"] == "qlora" and manifest.get("format") == "bitsandbytes"
    return "nf4" if stock and manifest["recipe"]["bits"] == 4 else ""
