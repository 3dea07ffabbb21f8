"""Pico models: real transformers models of two layers, made from a config and saved to a temporary folder.

Nothing that takes seconds to import is imported before it is used: the process that only hands tests out to the others
reads this file too.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from loftq_cli.main import main

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU its kernels run on the CPU, however slowly: Triton reads this when transformers imports it."""
    hands_out = config.getoption("tx", None) and not hasattr(config, "workerinput")  # to processes of pytest-xdist
    if not hands_out:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Let Python's collector of cycles pass over the libraries, which are imported by now: a tenth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pico_llama(**changes: object) -> LlamaForCausalLM:
    """A llama of two layers in bfloat16 with reproducible weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).bfloat16()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return fast


def save_model(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    """Save a model and the tokenizer as a user would have them."""
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama checkpoint folder in one file, untied. Do not write to it."""
    return save_model(pico_llama(), tmp_path_factory.mktemp("pico") / "pico-llama")


@pytest.fixture(scope="session")
def pico_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same llama in several shards with an index. Do not write to it."""
    return save_model(pico_llama(), tmp_path_factory.mktemp("pico") / "pico-sharded", max_shard_size="60KB")


class Result(NamedTuple):
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line in this process, errors and exit codes included: `run("quantize", folder)`.

    Libraries that draw on terminals may leave their width in the environment.
    """
    if "COLUMNS" in os.environ:
        monkeypatch.delenv("COLUMNS")

    def invoke(*arguments: object) -> Result:
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return Result(code, *capsys.readouterr())

    return invoke


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Two threads, whatever the machine, so that compiled loops share their work out; others on demand."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what runs on devices other than the CPU, several chunks of it."""
    from loftq.core.kernels import dispatch

    monkeypatch.setattr(dispatch, "on_cpu", lambda _: False)
    monkeypatch.setattr(dispatch, "CHUNK", 1 << 11)


@pytest.fixture
def triton_path(torch_path: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """The same with Triton's kernels, interpreted on the CPU."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("with a GPU kernels are compiled for it: test_cuda_*.py run them")

    from loftq.core.kernels import dispatch

    monkeypatch.setattr(dispatch, "on_gpu", lambda _: True)


@pytest.fixture
def cuda() -> torch.device:
    """A GPU, or the test is skipped."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that CUDA knows")
    return torch.device("cuda")


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Tests do not wait until their files survive a power cut; those of power cuts replace these calls themselves."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda _descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a seed of its own is the same in every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Names of folders that are not there yet: `mktemp` for each test would read thousands of names each time."""
    parent = tmp_path_factory.mktemp("homes")
    return (parent / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _clean_home(_homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the caches or the login of whoever runs it."""
    home = next(_homes)
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
