"""Loading: by the lines of the original README in a process without loftq, and by load_qlora.

Covers: loftq/models/adapters.py, loftq/models/refusals.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from processes import run_python

import loftq
from loftq.errors import ArtifactError
from loftq.models.loading import guard_cpu

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5, 64, 128]])

SNIPPET = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from peft import PeftModel

MODEL_DIR = sys.argv[1]
base_model = AutoModelForCausalLM.from_pretrained(
    MODEL_DIR,
    torch_dtype=torch.bfloat16,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=False,
        bnb_4bit_quant_type='nf4',
    ),
)
peft_model = PeftModel.from_pretrained(base_model, MODEL_DIR, subfolder="loftq_init", is_trainable=True)
"""
TRAIN = """
before = {name: tensor.clone() for name, tensor in peft_model.state_dict().items()}
tokens = torch.arange(20).view(2, 10)
optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
peft_model.train()
losses = []
for _ in range(8):
    loss = peft_model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
changed = {name for name, tensor in peft_model.state_dict().items() if not torch.equal(tensor, before[name])}
assert changed and all(".lora_" in name for name in changed), changed
assert "loftq" not in sys.modules
print("trained")
"""


@pytest.fixture(scope="module")
def artifact(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "out"
    return loftq.quantize(str(pico), output=folder, rank=4, iters=2, quiet=True).folder


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def evaluate(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_unchanged_snippet_loads_and_trains_without_loftq(artifact: Path) -> None:
    """Oracle: stock transformers and peft, in a process that never imports loftq."""
    done = run_python(SNIPPET + TRAIN, artifact)
    assert done.stdout.strip().endswith("trained"), done.stderr


def test_gradients_survive_an_evaluation(artifact: Path) -> None:
    """Oracle: the gradients of the same model before anything was evaluated."""
    model = loftq.load_qlora(artifact)
    before = gradients(model)
    evaluate(model)
    after = gradients(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, Linear4bit))


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")
def test_the_guard_is_needed(artifact: Path) -> None:
    """Without it an evaluation changes what the packed weights mean: the day this fails, the guard can go."""

    def dequantized(module: Linear4bit) -> torch.Tensor:
        return dequantize_4bit(module.weight.data, module.weight.quant_state)

    model = loftq.load_qlora(artifact)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    honest = dequantized(layer)
    evaluate(model)
    assert torch.equal(dequantized(layer), honest)
    layer.support_avx512bf16_for_cpu = True
    evaluate(model)
    broken = dequantized(layer)
    assert broken.shape != honest.shape or not torch.allclose(broken, honest, atol=1e-2)


def test_precision_of_what_is_not_quantized(artifact: Path) -> None:
    model = loftq.load_qlora(artifact)
    tensors = dict(model.base_model.model.named_parameters())
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert tensors["model.norm.weight"].dtype == torch.float32
    assert tensors["model.layers.1.input_layernorm.weight"].dtype == torch.float32
    assert evaluate(model).dtype == torch.bfloat16


def test_compute_dtype_can_be_changed(artifact: Path) -> None:
    """Oracle: the bfloat16 model's logits, to bfloat16's precision."""
    exact = loftq.load_qlora(artifact, dtype=torch.float32)
    logits = evaluate(exact)
    assert logits.dtype == torch.float32
    coarse = evaluate(loftq.load_qlora(artifact)).float()
    assert (logits - coarse).norm() < 0.03 * logits.norm()


def test_gradient_checkpointing_gives_the_same_gradients(artifact: Path) -> None:
    model = loftq.load_qlora(artifact)
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name])


def test_inference_needs_no_gradients(artifact: Path) -> None:
    model = loftq.load_qlora(artifact, is_trainable=False)
    assert not any(p.requires_grad for p in model.parameters())


def test_trained_adapter_comes_back(artifact: Path, tmp_path: Path) -> None:
    """Oracle: the logits before saving."""
    model = loftq.load_qlora(artifact)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    wanted = evaluate(model)
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(evaluate(loftq.load_qlora(artifact, tmp_path / "trained")), wanted)
    assert not torch.equal(evaluate(loftq.load_qlora(artifact)), wanted)


def test_adapter_of_another_backbone_is_refused(artifact: Path, pico: Path, tmp_path: Path) -> None:
    other = loftq.quantize(str(pico), output=tmp_path / "other", rank=4, iters=1, quiet=True).folder
    with pytest.raises(ArtifactError, match=r"was trained on .*, not on the backbone"):
        loftq.load_qlora(artifact, other / "loftq_init")


def test_adapter_of_the_same_backbone_elsewhere_is_taken(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    assert isinstance(loftq.load_qlora(tmp_path / "copy"), PeftModel)
    assert isinstance(loftq.load_qlora(artifact, tmp_path / "copy" / "loftq_init"), PeftModel)


def test_adapter_that_does_not_fit_is_refused(artifact: Path, tmp_path: Path) -> None:
    from conftest import pico_llama, save_model

    wide = save_model(pico_llama(hidden_size=128), tmp_path / "wide")
    other = loftq.quantize(str(wide), output=tmp_path / "other", rank=4, iters=1, quiet=True).folder
    config = other / "loftq_init" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "gone"}))
    with pytest.raises(ArtifactError, match="does not fit"):
        loftq.load_qlora(artifact, other / "loftq_init")


def test_incomplete_folder_is_refused(artifact: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(artifact, tmp_path / "broken")
    (broken / "loftq.json").unlink()
    with pytest.raises(ArtifactError, match="--resume"):
        loftq.load_qlora(broken)


def test_adapter_without_config_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"adapter_config\.json"):
        loftq.load_qlora(artifact, tmp_path)


def test_guard_reaches_every_quantized_linear(artifact: Path) -> None:
    model = loftq.load_qlora(artifact)
    found = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for module in found:
        module.support_avx512bf16_for_cpu = True
    guard_cpu(model)
    assert len(found) == 14
    assert not any(module.support_avx512bf16_for_cpu for module in found)
