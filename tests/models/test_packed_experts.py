"""Fused experts of many types of mixtures, from the checkpoint through a step of training to a merged model.

Covers: loftq/models/packed_experts.py, loftq/models/expert_pass.py, loftq/models/peft_experts.py,
loftq/models/expert_stacks.py, loftq/formats/expert_factors.py, loftq/planning/experts.py.

Oracle of all: the dense model of transformers, with dequantized weights and peft's own wrapper of parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, save_mixture
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper as StockWrapper
from transformers import AutoModelForCausalLM

import loftq
from loftq.formats.artifact import open_artifact
from loftq.models.packed_experts import PackedExperts
from loftq.models.packed_linear import PackedLinear

TOKENS = torch.randint(6, 290, (4, 12), generator=torch.Generator().manual_seed(0))
OPTIONS: tuple[dict[str, Any], ...] = (
    {"bits": 4},
    {"bits": 2, "double_quant": True},
    {"bits": 3, "quant_type": "int", "group_size": 32},
    {"bits": 8, "expert_bits": 4},
)
QUICK = ("qwen3_moe", "gpt_oss", "nemotron_h")
CASES = [
    pytest.param(name, OPTIONS[i % len(OPTIONS)], id=name, marks=() if name in QUICK else pytest.mark.slow)
    for i, name in enumerate(MIXTURES)
]
CODED = {"bits": 2.25, "quant_type": "tcq"}
CASES += [
    pytest.param("qwen3_moe", CODED, id="qwen3_moe-tcq"),
    *(pytest.param(name, CODED, id=f"{name}-tcq", marks=pytest.mark.slow) for name in ("mixtral", "gpt_oss")),
]


def stock_model(source: Path, packed: Any, adapter: Path) -> Any:
    """The dense model of a checkpoint with the values of a packed one, and an adapter that stock peft loads."""
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager")
    state = dense.state_dict()
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            state[f"{name}.weight"].copy_(module.dequantize())
        elif isinstance(module, PackedExperts):
            for last in module.packed_stacks:
                state[f"{name}.{last}"].copy_(module.dequantize(last))
    adapted = PeftModel.from_pretrained(dense, adapter, is_trainable=True)
    assert any(type(module) is StockWrapper for module in adapted.modules())
    return adapted.eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixture(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = save_mixture(name, tmp_path / "source")
    if options["bits"] != 8 and "quant_type" not in options:
        options = {"block_size": 32, **options}
    report = loftq.quantize(str(source), output=tmp_path / "out", rank=8, iters=2, quiet=True, **options)
    rows = {row["name"]: row for row in open_artifact(report.folder).manifest["layers"]}
    model = loftq.load_qlora(report.folder, dtype=torch.float32).eval()
    base = model.get_base_model()
    stacks = [
        f"{n}.{last}" for n, m in base.named_modules() if isinstance(m, PackedExperts) for last in m.packed_stacks
    ]
    plain = [key.replace(".base_layer", "") for key in stacks]
    assert {row for row in rows if len(rows[row]["shape"]) == 3} == set(plain)
    assert len(plain) >= 2

    stock = stock_model(source, AutoModelForCausalLM.from_pretrained(report.folder), report.folder / "loftq_init")
    torch.manual_seed(1)
    theirs = dict(stock.named_parameters())
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {key for key, p in theirs.items() if p.requires_grad}
    with torch.no_grad():
        for key, parameter in trained.items():
            assert torch.equal(parameter, theirs[key])
            parameter.add_(torch.randn_like(parameter) * 0.02)
            theirs[key].copy_(parameter)

    outputs = [m(input_ids=TOKENS, labels=TOKENS) for m in (model, stock)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.loss.backward()
    found, expected = gradients(model), gradients(stock)
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()), msg=key)
    for m in (model, stock):
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1).step()
    after = model(input_ids=TOKENS, labels=TOKENS)
    assert after.loss < outputs[0].loss
    torch.testing.assert_close(after.logits, stock(input_ids=TOKENS).logits, rtol=1e-3, atol=1e-3)

    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for key in plain:  # the start, whose error the report tells, is near the original weights
        owner, _, last = key.rpartition(".")
        weight = full.get_parameter(key).detach()
        rounded = AutoModelForCausalLM.from_pretrained(report.folder).get_submodule(owner).dequantize(last)
        assert float((weight - rounded).norm() / weight.norm()) < 1.1 * rows[key]["plain_error"] + 0.02

    model.save_pretrained(tmp_path / "trained")
    again = loftq.load_qlora(report.folder, tmp_path / "trained", dtype=torch.float32).eval()
    torch.testing.assert_close(again(input_ids=TOKENS).logits, after.logits, rtol=0, atol=0)
    prompt = TOKENS[:1, :4]
    tokens = [m.generate(input_ids=prompt, max_new_tokens=4, do_sample=False) for m in (again, stock)]
    assert torch.equal(*tokens)

    merged = loftq.merge(report.folder, tmp_path / "trained", to="bf16", output=tmp_path / "merged", quiet=True)
    dense = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)
    wanted = stock.merge_and_unload().state_dict()
    for key, tensor in dense.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key].bfloat16().float(), rtol=2**-7, atol=1e-6, msg=key)
    assert loftq.verify(report.folder, source, quiet=True).sound
