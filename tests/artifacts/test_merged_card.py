"""Cards of merged folders, and the lines that serve them.

Oracles: the Hub's own client, which reads the metadata; Python, which runs the lines that load; and vLLM's documented
ranks.

Covers: loftq/artifacts/serving.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from loftq.artifacts.manifest import origin_of
from loftq.artifacts.merged_card import merged_card_text, merged_section
from loftq.artifacts.serving import BASE, PLACE, serving_lines, serving_section, vllm_rank
from loftq.merging.targets import TARGETS


def manifest_of(target: str, **source: Any) -> dict[str, Any]:
    kind = "adapter" if target.endswith("lora") else "gguf" if target.startswith("gguf") else "merged"
    made_from = {"model": "pico-4bit", "task": "causal-lm", "target": target, "adapter": "plain LoRA", "rank": 12}
    formats = {"bf16": "dense", "int": "loftq", "lora": ""}
    files = dict.fromkeys(["pico-Q4_K_M.gguf" if kind == "gguf" else "mine-lora.gguf", "config.json"])
    return {
        "kind": kind,
        "format": formats.get(target, target),
        "source": made_from | source,
        "files": files,
        "recipe": {},
    }


@pytest.mark.parametrize("target", TARGETS)
def test_the_card_of_each_target(target: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    manifest = manifest_of(target, base="user/model")
    card = ModelCard(merged_card_text(manifest, tmp_path))
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "user/model")
    assert target in card.data.tags
    if manifest["kind"] == "merged":
        code = card.text.partition("```python\n")[2].partition("```")[0]
        compile(code, "card", "exec")
        assert f'"{PLACE}"' in code
    assert (target in ("int", "gptq")) == (not serving_lines(manifest))
    pushed = merged_section(manifest, "alice/served", "branch")
    assert PLACE not in pushed
    if target not in ("int", "gptq"):
        assert serving_lines(manifest, "alice/served", "branch")[0].startswith(
            "hf download alice/served --revision branch"
        )


def test_lines_name_the_file_the_base_and_a_rank_that_vllm_takes() -> None:
    assert serving_lines(manifest_of("gguf"))[0] == "llama-server -m pico-Q4_K_M.gguf"
    assert serving_lines(manifest_of("gguf"), "a/b") == ("llama-server -hf a/b", "ollama run hf.co/a/b")
    line = serving_lines(manifest_of("lora", base="user/model"))[0]
    assert line == f"vllm serve user/model --enable-lora --max-lora-rank 16 --lora-modules mine={PLACE}"
    assert [vllm_rank(rank) for rank in (1, 8, 9, 33, 512, 600)] == [1, 8, 16, 64, 512, 600]


def test_models_that_do_not_write_text_have_no_such_lines() -> None:
    assert serving_lines(manifest_of("bf16", task="sequence-classification")) == ()


def test_the_adapter_of_a_qalora_belongs_to_its_backbone() -> None:
    for target in ("lora", "mlx-lora", "gguf-lora"):
        manifest = manifest_of(target, base="user/model", adapter="QA-LoRA (pools of 64)")
        assert f" {BASE}" in serving_lines(manifest)[0]
        assert "the backbone pico-4bit, exported without rounding it again" in serving_section(manifest)


def test_the_base_is_named_only_where_it_is_on_the_hub(tmp_path: Path) -> None:
    start = {"task": "causal-lm"}
    assert origin_of(tmp_path, {"source": {**start, "model": "user/model"}}) == {
        "original": "user/model",
        "base": "user/model",
    }
    local = origin_of(tmp_path, {"source": {**start, "model": str(tmp_path)}})
    assert local == {"original": tmp_path.name, "base": None}
    merged = {"model": "folder", "target": "bf16", "original": "user/model", "base": "user/model"}
    assert origin_of(tmp_path, {"source": merged}) == {"original": "user/model", "base": "user/model"}
    assert origin_of(tmp_path, None) == {"original": None, "base": None}
    (tmp_path / "README.md").write_text("---\nbase_model: user/model\n---\n")
    assert origin_of(tmp_path, None)["base"] == "user/model"
