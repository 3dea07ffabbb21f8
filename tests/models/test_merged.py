"""Folders of every target of `loftq merge`, used again. Oracle: the perplexity of the backbone with its adapter.

Covers: loftq/artifacts/merged_card.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import pico_llama
from pico_tokenizers import byte_level

import loftq
from loftq.errors import ArtifactError

TEXT = "The quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoftQ and a QA-LoRA folder, and a text. The tokenizer has merges, which GGUF needs."""
    here = tmp_path_factory.mktemp("merged")
    model = pico_llama(num_key_value_heads=4)
    model.save_pretrained(here / "model")
    byte_level("smollm").save_pretrained(here / "model")
    fast: dict[str, Any] = {"rank": 2, "iters": 1, "quiet": True}
    loftq.quantize(str(here / "model"), output=here / "lora", **fast)
    loftq.quantize(str(here / "model"), output=here / "qalora", adapter="qalora", group_size=32, **fast)
    (here / "text.txt").write_text(TEXT, encoding="utf-8")
    return here


@pytest.mark.parametrize(
    ("kind", "to", "options"),
    [
        ("lora", "bf16", {}),
        ("qalora", "int", {}),
        ("qalora", "gptq", {"allow_rounding": True}),
        pytest.param("lora", "compressed-tensors", {}, marks=pytest.mark.slow),
        pytest.param("qalora", "gguf-q4_1", {}, marks=pytest.mark.slow),
        pytest.param("lora", "lora", {}, marks=pytest.mark.slow),
        ("qalora", "lora", {}),
    ],
)
def test_a_merged_folder_writes_and_is_measured(
    kind: str, to: str, options: dict[str, Any], backbones: Path, tmp_path: Path
) -> None:
    loftq.merge(backbones / kind, to=to, output=tmp_path / "out", check=False, quiet=True, **options)
    measured = loftq.evaluate(str(tmp_path / "out"), data=str(backbones / "text.txt"), quiet=True, dtype="float32")
    start = loftq.evaluate(str(backbones / kind), data=str(backbones / "text.txt"), quiet=True, dtype="float32")
    ((name, row),) = measured.rows.items()
    assert name == ("trained" if to == "lora" else "model")
    assert row["perplexity"] == pytest.approx(start.rows["start"]["perplexity"], rel=0.03)
    assert loftq.generate(str(tmp_path / "out"), "The quick", max_new_tokens=2) is not None


def test_what_transformers_does_not_read_is_said(backbones: Path, tmp_path: Path) -> None:
    loftq.merge(backbones / "qalora", to="mlx", output=tmp_path / "mlx", check=False, quiet=True)
    loftq.merge(backbones / "lora", to="mlx-lora", output=tmp_path / "mlx-lora", check=False, quiet=True)
    with pytest.raises(ArtifactError, match=r"MLX.s own layout: use `mlx_lm\.generate --model"):
        loftq.generate(str(tmp_path / "mlx"), "x")
    with pytest.raises(ArtifactError, match="an adapter that peft does not read"):
        loftq.generate(str(tmp_path / "mlx-lora"), "x")
    loftq.merge(backbones / "qalora", to="int", output=tmp_path / "int", check=False, quiet=True)
    with pytest.raises(ArtifactError, match="is a merged model, which takes no adapter"):
        loftq.generate(str(tmp_path / "int"), "x", adapter=str(backbones / "qalora" / "loftq_init"))
    with pytest.raises(ArtifactError, match="is a merged folder, which has no adapter to train"):
        loftq.train(str(tmp_path / "int"), data=str(backbones / "text.txt"), task="clm", output=tmp_path / "out")


def test_a_merged_card_names_base_and_licence(backbones: Path, tmp_path: Path) -> None:
    """Oracle: the metadata of the source's own card, which the folder's card took over."""
    card = backbones / "lora" / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace("---\n", "---\nbase_model: meta/model\nlicense: apache-2.0\n", 1), encoding="utf-8")
    loftq.merge(backbones / "lora", to="bf16", output=tmp_path / "out", check=False, quiet=True)
    card.write_text(text, encoding="utf-8")
    written = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for line in ("base_model: meta/model", "license: apache-2.0", "quantized from `model`", "merge --to bf16"):
        assert line in written
    assert str(backbones) not in written
