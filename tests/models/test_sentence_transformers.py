"""Folders of sentence-transformers' models. Oracle: its own `encode`, and the mean of a stock model's hidden states.

Covers: loftq/formats/model_files.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, save_model
from picos import pico_model
from transformers import AutoModel

import loftq

TEXTS = ["a cat sat", "the dog ran far away"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico BERT with a module that takes the mean over tokens."""
    folder = save_model(pico_model("bert", "feature-extraction").float(), tmp_path_factory.mktemp("st") / "source")
    byte_tokenizer().save_pretrained(folder)
    pooling = folder / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}))
    kinds = {"": "sentence_transformers.models.Transformer", "1_Pooling": "sentence_transformers.models.Pooling"}
    modules = [{"idx": i, "name": str(i), "path": path, "type": kinds[path]} for i, path in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_the_folder_embeds_as_its_backbone_and_nearer_with_its_adapter(source: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = loftq.quantize(str(source), output=tmp_path / "out", rank=16, compute_dtype="float32", quiet=True).folder
    right = torch.from_numpy(SentenceTransformer(str(source), device="cpu").encode(TEXTS))
    embedder = SentenceTransformer(str(folder), device="cpu")
    alone = torch.from_numpy(embedder.encode(TEXTS))
    inputs = embedder.tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1)
    torch.testing.assert_close(alone, (hidden * mask).sum(dim=1) / mask.sum(dim=1), rtol=1e-4, atol=1e-4)
    embedder[0].model = loftq.load_qlora(folder, is_trainable=False).base_model.model
    adapted = torch.from_numpy(embedder.encode(TEXTS))
    assert (adapted - right).norm() < 0.9 * (alone - right).norm()
