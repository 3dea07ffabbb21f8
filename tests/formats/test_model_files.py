"""Which files belong to a model. Oracles: the names that transformers declares, and the files that it saves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from conftest import byte_tokenizer
from pico_tokenizers import byte_level, sentence_piece
from transformers import GenerationConfig, ViTImageProcessor

from loftq.errors import CheckpointError
from loftq.formats.model_files import check_model_folder, is_model_file, is_side_file, model_file_names

STAYS = [
    "x.txt",
    "notes.txt",
    "data.json",
    "trainer_state.json",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "all_results.json",
    ".env",
    ".netrc",
    ".tokenizer.json",
    ".license",
    "modules.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "quantize_config.json",
    "modeling_own.py",
    "license.py",
    "LICENSE.pkl",
    "notice.sh",
    "credentials.json",
    "tokenizer.pkl",
    "tokenizer",
    "sub/tokenizer.json",
    "../tokenizer.json",
    "/tokenizer.json",
    "sub\\tokenizer.json",
    "tokenizer\x1b.json",
    "additional_chat_templates/x.json",
    "additional_chat_templates/.x.jinja",
    "additional_chat_templates/LICENSE",
    "additional_chat_templates/sub/x.jinja",
]
COPIED = [
    "LICENSE",
    "LICENSE.txt",
    "LICENSE-2.0.md",
    "LICENSE.Apache-2.0",
    "License.md",
    "NOTICE",
    "Notice.txt",
    "MODEL_LICENSE",
    "USE_POLICY.md",
    "GEMMA_TERMS.txt",
    "tokenizer.model.v3",
    "qwen.tiktoken",
    "tekken.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
]


def test_every_file_that_a_tokenizer_of_transformers_declares_is_copied() -> None:
    declared = set()
    for path in (Path(transformers.__file__).parent / "models").rglob("tokenization_*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(encoding="utf-8"), re.DOTALL):
            declared |= set(re.findall(r": \"([\w.-]+)\"", table))
    assert len(declared) > 20
    assert {name for name in declared if not is_side_file(name)} == set()


def test_every_file_that_is_saved_beside_weights_is_copied(tmp_path: Path) -> None:
    for number, tokenizer in enumerate((byte_tokenizer(), byte_level("llama-bpe"), sentence_piece())):
        tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
        tokenizer.save_pretrained(tmp_path / str(number))
    GenerationConfig(max_new_tokens=3).save_pretrained(tmp_path / "generation")
    ViTImageProcessor().save_pretrained(tmp_path / "processor")
    saved = [path.relative_to(folder) for folder in tmp_path.iterdir() for path in folder.rglob("*") if path.is_file()]
    assert any(len(name.parts) == 2 for name in saved)  # additional_chat_templates
    assert [name for name in saved if not is_side_file(name.as_posix())] == []


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_behind(name: str) -> None:
    assert not is_side_file(name)


@pytest.mark.parametrize("name", COPIED)
def test_what_is_copied(name: str) -> None:
    assert is_side_file(name)


def test_code_is_copied_only_on_request() -> None:
    assert is_side_file("modeling_own.py", code=True)
    assert not is_side_file("sub/modeling_own.py", code=True)
    assert not is_side_file(".own.py", code=True)


@pytest.mark.parametrize(
    "name", ["config.json", "model-00001-of-00002.safetensors", "README.md", "adapter_config.json"]
)
def test_what_is_read_and_not_copied(name: str) -> None:
    assert is_model_file(name)
    assert not is_side_file(name)


@pytest.mark.parametrize(
    "name", ["config.json", "README.md", "x.safetensors", "tokenizer.json", "additional_chat_templates/x.jinja"]
)
def test_a_file_that_is_read_may_not_lie_outside(name: str, tmp_path: Path) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    secret.write_text("secret")
    (folder / name).parent.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "notes").symlink_to(secret)  # nobody reads it
    check_model_folder(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    assert name in list(model_file_names(folder))
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is a symbolic link to {secret}"):
        check_model_folder(folder)


def test_the_folder_of_templates_may_not_lie_outside(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "x.jinja").write_text("secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "additional_chat_templates").symlink_to(tmp_path / "home")
    with pytest.raises(CheckpointError, match="lies outside"):
        check_model_folder(tmp_path / "model")
