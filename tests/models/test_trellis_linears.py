"""Linears of trellis codes. Oracles: the decoded matrix as an ordinary linear, and stock transformers and peft.

Covers: loftq/models/trellis_linears.py, loftq/models/trellis_quantizer.py, loftq/formats/trellis_streams.py,
loftq/models/packed_product.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import pico_llama, save_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import loftq
from loftq.core.grid import ROW, Grid
from loftq.core.solvers.methods import METHODS
from loftq.core.solvers.trellis_coded import solve_trellis
from loftq.core.trellis import TrellisCode, TrellisQuantizer
from loftq.errors import ArtifactError
from loftq.formats import trellis_streams
from loftq.models import packed_linear
from loftq.models.trellis_linears import TrellisLinear, build

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5]])


def coded_linear(rows: int, columns: int, bits: float, kind: str = "tcq") -> tuple[TrellisLinear, nn.Linear]:
    """A coded linear, and an ordinary one with the values that the solver's codes stand for."""
    torch.manual_seed(0)
    dense, grid = nn.Linear(columns, rows), Grid(f"{kind}{bits:g}", ROW)
    quantizer = TrellisQuantizer(bits, grid.state_bits)
    solution = solve_trellis(dense.weight.detach(), quantizer, METHODS["qlora"], None, 1, 0, 1.0)
    coded = build(dense, grid, solution, None)
    with torch.no_grad():
        dense.weight.copy_(quantizer.decode(solution.codes, solution.scales, dense.weight.shape))
    return coded, dense


@pytest.mark.parametrize(("rows", "columns", "bits"), [(40, 24, 2.0), (33, 17, 2.5), (8, 64, 1.5), (1, 8, 4.0)])
@pytest.mark.parametrize("part", [1 << 24, 256])
def test_outputs_and_gradients_are_those_of_the_decoded_matrix(
    rows: int, columns: int, bits: float, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded at once and in parts; sides may be odd."""
    monkeypatch.setattr(packed_linear, "PART", part)
    coded, dense = coded_linear(rows, columns, bits)
    assert torch.equal(coded.dequantize(), dense.weight)
    results = []
    for linear in (coded, dense):
        x = torch.randn(9, columns, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = linear(x)
        out.square().sum().backward()
        results.append((out, x.grad))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)
    assert torch.equal(coded.to_dense().weight, dense.weight)


def test_fewer_states_take_less_and_leave_more() -> None:
    """A code of 2^10 states differs from one of 2^12, in its stream and in its error."""
    errors, sizes = [], []
    for kind in ("tcq", "tcqfast"):
        coded, _ = coded_linear(200, 64, 2.0, kind)
        torch.manual_seed(0)
        errors.append(float((coded.dequantize() - nn.Linear(64, 200).weight).detach().square().sum()))
        sizes.append(len(coded.weight))
    assert errors[0] < errors[1] < 1.2 * errors[0]
    assert sizes[0] - sizes[1] == 64 * 2 // 32  # two bits a column


@pytest.mark.parametrize("path", ["compiled", "torch", "triton"])
@pytest.mark.parametrize(
    ("kind", "rows", "columns", "bits"), [("tcq", 300, 24, 2.5), ("tcq", 33, 17, 4.0), ("tcqfast", 40, 24, 2.5)]
)
def test_a_few_vectors_need_no_decoded_weight(
    kind: str,
    rows: int,
    columns: int,
    bits: float,
    path: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: autograd through the decoded matrix. On a CPU and a GPU, the weight must not be decoded."""
    coded, dense = coded_linear(rows, columns, bits, kind)
    if path != "compiled":
        request.getfixturevalue(f"{path}_path")
    if path != "torch":
        monkeypatch.setattr(TrellisCode, "decode", None)
    for shape in ((1,), (4,), (1, 1), (2, 2), ()):
        x = torch.randn(*shape, columns)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(each) for layer, each in zip((coded, dense), inputs, strict=True)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        gradient = torch.randn_like(outputs[0])
        torch.testing.assert_close(
            *(torch.autograd.grad(out, each, gradient) for out, each in zip(outputs, inputs, strict=True)),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch of itself
def test_a_compiled_linear_is_the_same() -> None:
    """Oracle: the linear as it is, for a few vectors and for more."""
    coded, _ = coded_linear(40, 24, 2.5)
    compiled = torch.compile(coded, backend="aot_eager", fullgraph=True)
    for count in (1, 9):
        x = torch.randn(count, 24, requires_grad=True)
        torch.testing.assert_close(compiled(x), coded(x))
        compiled(x).sum().backward()


def test_scales_keep_their_precision() -> None:
    """A model that changes its dtype leaves rows in float32 and columns in float16."""
    coded, dense = coded_linear(40, 24, 2.0)
    coded.to(torch.bfloat16)
    assert torch.equal(coded.dequantize(), dense.weight)
    assert coded(torch.ones(1, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_tensors_and_their_inverse() -> None:
    weight = torch.randn(24, 16)
    solution = solve_trellis(weight, TrellisQuantizer(2.25), METHODS["loftq"], None, 2, 2, 1.0)
    grid = Grid("tcq2.25", ROW)
    stored = trellis_streams.tensors("m", (24, 16), grid, torch.bfloat16, solution.codes, solution.scales)
    for spec in trellis_streams.specs("m", (24, 16), grid, torch.bfloat16):
        assert (stored[spec.name].dtype, tuple(stored[spec.name].shape)) == (spec.dtype, spec.shape)
    codes, scales = trellis_streams.read("m", (24, 16), grid, stored.__getitem__)
    quantizer = TrellisQuantizer(2.25)
    expected = quantizer.decode(solution.codes, solution.scales, weight.shape)
    assert torch.equal(quantizer.decode(codes, scales, weight.shape), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico llama in two budgets, with its source beside it."""
    parent = tmp_path_factory.mktemp("trellis")
    source = save_model(pico_llama(), parent / "source")
    return loftq.quantize(str(source), output=parent / "out", bits=2.25, quant_type="tcq", rank=4, quiet=True).folder


def test_stock_libraries_load_it_after_the_import(folder: Path) -> None:
    """Backbone plus adapter is what the files say, tensor by tensor; the adapter trains, and a new one too."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True)
    linears = {name: module for name, module in base.named_modules() if isinstance(module, TrellisLinear)}
    assert len(linears) == 14
    stored = load_file(folder / "model.safetensors")
    for name, module in linears.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(
                tensor, stored[f"{name.replace('.base_layer', '').removeprefix('base_model.model.')}.{key}"]
            )
    logits = model(TOKENS, labels=TOKENS)
    logits.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(TOKENS).logits, logits.logits, rtol=0.05, atol=0.05)
    again = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    again(TOKENS, labels=TOKENS).loss.backward()


def test_a_saved_model_is_the_same(folder: Path, tmp_path: Path) -> None:
    """`save_pretrained` writes the tensors as they were."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    copied, before = load_file(tmp_path / "copy/model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(copied[name], tensor) for name, tensor in before.items() if name in copied)
    assert {name for name in before if "weight_rows" in name} <= set(copied)


@pytest.mark.parametrize(
    ("entry", "said"),
    [({"format_version": 9}, "upgrade loftq"), ({"codebook": "tcq9"}, "tcq9"), ({"codebook": "tcq3"}, "expected")],
)
def test_a_config_that_does_not_fit_is_refused(
    entry: dict[str, object], said: str, folder: Path, tmp_path: Path
) -> None:
    """A later format, a budget that does not exist, and one that is not that of the files."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ArtifactError, loftq.errors.LoftQError), match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path)
