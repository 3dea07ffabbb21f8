"""Every family of the table and some without a row: quantized, loaded by stock transformers and peft (or, where the
plan says so, by transformers with our plug-in), and compared with the weights they came from.

Covers: loftq/planning/notes.py.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import save_model
from grids import thinned
from oracles import read_linear
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from picos import CHANGES, TWINS, dtype_of, output_of, pico_config, pico_model, save_pico
from small_models import save_small
from transformers.pytorch_utils import Conv1D

import loftq
from loftq.formats.artifact import open_artifact
from loftq.models.expert_stacks import find_stacks
from loftq.models.families import FAMILIES, family_of
from loftq.models.gptq_linear import GptqLinear
from loftq.models.linears import find_linears, reaches
from loftq.models.loading import guard_cpu
from loftq.models.packed_linear import PackedLinear
from loftq.models.tasks import TASKS, auto_class

GENERIC = {"granite": "causal-lm", "stablelm": "causal-lm", "codegen": "causal-lm", "camembert": "masked-lm"}
CASES = [
    (name, task)
    for name in CHANGES
    for task in (family_of(name.partition("/")[0]).tasks or (GENERIC[name],))
    if "/" not in name or task == family_of(name.partition("/")[0]).tasks[0]
]

# Each family that differs from the others with its first task, and each task with the first family that has it.
QUICK = {*{name: (name, task) for name, task in reversed(CASES) if name not in TWINS}.values()}
QUICK |= {*{task: (name, task) for name, task in reversed(CASES)}.values()}


def load_stock(folder: Path, task: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """As the card says: the base and the peft model on it."""
    base, loading = auto_class(TASKS[task]).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    heads = find_linears(base).heads if TASKS[task].has_head else ()
    assert {key.split(".")[0] for key in loading["missing_keys"]} <= set(heads)
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    guard_cpu(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return base, PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True).eval()


def dense_weights(model: Any) -> dict[str, torch.Tensor]:
    """Weights (out, in) of all dense layers."""
    return {
        name: module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }


def train_one_step(model: Any, base: Any) -> set[str]:
    """The names of what a step changed, frozen weights included."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    output_of(model, base).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    model.eval()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_every_row_has_a_pico_model() -> None:
    assert {name.partition("/")[0] for name in CHANGES} == set(FAMILIES) | set(GENERIC)


# In the formats beside NF4's: each format with each kind of linear (plain, transposed, of a class of its own, with
# a weight that stays in float32), and each other peculiarity (fused weights, experts, names) with one format.
PACKED = ["llama", "gpt2", "falcon", "t5"]
ONCE = ["phi3", "mixtral", "bert", "deberta"]
KINDS = defaultdict(
    lambda: PackedLinear,
    {("bitsandbytes", 4): Linear4bit, ("bitsandbytes", 8): Linear8bitLt, ("gptq", 3): GptqLinear},
)
NF4: dict[str, Any] = {"bits": 4}
# Here fused experts stay in 16 bits; test_packed_experts.py quantizes them.
EXPERTS = dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"), ("experts",))
OTHERS: tuple[dict[str, Any], ...] = (
    {"bits": 2},
    {"bits": 3, "quant_type": "int", "group_size": 32},
    {"bits": 8},
)


@pytest.mark.parametrize(
    ("name", "task", "options"),
    [
        *thinned(((name, task, NF4) for name, task in CASES), lambda name, task, _: (name, task) in QUICK),
        *thinned(
            ((name, family_of(name).tasks[0], options) for name in PACKED for options in OTHERS),
            lambda name, _, options: PACKED.index(name) % 3 == OTHERS.index(options),
        ),
        *((name, family_of(name).tasks[0], options) for name, options in zip(ONCE, cycle(OTHERS), strict=False)),
    ],
    ids=str,
)
def test_family(name: str, task: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Oracles: bitsandbytes' dequantization, peft's scaling, the report's errors, full-precision outputs."""
    source, dtype = save_pico(name, task, tmp_path / "source"), dtype_of(name)
    settings: dict[str, Any] = {"rank": 8, "iters": 3, "alpha": 16, "exclude_modules": EXPERTS.get(name, ())}
    report = loftq.quantize(str(source), output=tmp_path / "out", **options, **settings, quiet=True)
    folder = report.folder
    kind = KINDS[open_artifact(folder).manifest["format"], options["bits"]]
    assert report.task == task
    full = auto_class(TASKS[task]).from_pretrained(source, dtype=dtype).eval()
    weights = dense_weights(full)

    base, model = load_stock(folder, task, dtype)
    rows = {row["name"]: row for row in open_artifact(folder).manifest["layers"]}
    assert set(rows) == {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    quantized = {name for name, module in base.named_modules() if isinstance(module, kind)}
    assert {name.removesuffix(".base_layer") for name in quantized} == set(rows)
    for module, row in rows.items():
        layer = base.get_submodule(module)
        weight = weights[module].double()
        rounded = read_linear(layer.base_layer).double()
        factors = layer.lora_B["default"].weight.detach().double() @ layer.lora_A["default"].weight.detach().double()
        error = float((weight - rounded - layer.scaling["default"] * factors).norm() / weight.norm())
        assert error == pytest.approx(row["error"], rel=1e-5)
        assert error < row["plain_error"]

    with torch.no_grad():
        wanted = output_of(full)
        adapted = output_of(model, base)
        with model.disable_adapter():
            for wrapper in base.modules():  # the head is the adapter's: off, it would be one begun anew
                if isinstance(wrapper, ModulesToSaveWrapper):
                    wrapper.original_module.load_state_dict(wrapper.modules_to_save["default"].state_dict())
            alone = output_of(model, base)
    assert (adapted - wanted).norm() < (alone - wanted).norm()

    changed = train_one_step(model, base)
    assert changed
    assert all(".lora_" in key or ".modules_to_save." in key for key in changed), changed
    with torch.no_grad():
        trained = output_of(model, base)
    model.save_pretrained(tmp_path / "trained")
    again = loftq.load_qlora(folder, tmp_path / "trained")
    for key, parameter in model.named_parameters():  # the base is as it was loaded, and nothing else is left
        if key in changed or ".default." in key:
            parameter.data.zero_()
    model.load_adapter(str(tmp_path / "trained"), "trained")
    model.set_adapter("trained")
    with torch.no_grad():
        assert torch.equal(output_of(model.eval(), base), trained)
        close = output_of(again.eval(), base)
    assert (close - trained).norm() < 0.05 * trained.norm()  # norms in float32
    if again.base_model.model.supports_gradient_checkpointing:
        again.gradient_checkpointing_enable()
    changed = train_one_step(again, again.base_model.model)
    assert changed
    assert all(".lora_" in key or ".modules_to_save." in key for key in changed), changed


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_says_what_the_modules_say(name: str) -> None:
    """Oracle: the modules of the model. All that is not a target is a head, kept by the model's wish, or listed."""
    kind = name.partition("/")[0]
    family = family_of(kind)
    for task in family.tasks:
        with torch.device("meta"):
            model = auto_class(TASKS[task]).from_config(pico_config(name))
        found = find_linears(model)
        rest = [n for n in found.candidates if not any(reaches(p, n) for p in family.targets or ())]
        assert all(set(family.stays) & set(n.split(".")) for n in rest), rest
        left = {n for n in found.kept if not set(family.stays) & set(n.split("."))}
        assert not left or "router" in family.stays, left
        stock = all(dense.stock for dense in found.candidates.values()) and not find_stacks(model).candidates
        assert family.stock == stock


@pytest.mark.parametrize("name", ["gpt2", "phi3", "falcon", "bloom", "gpt_neox", "deberta", "t5"])
def test_weights_that_nf4_holds_exactly_come_back(name: str, tmp_path: Path) -> None:
    """Oracle: weights made of NF4's levels and powers of two, fused and transposed ones too: no error is left."""
    from loftq.core.codebooks import codebook

    task = family_of(name).tasks[0]
    model = pico_model(name, task)
    levels, generator = codebook("nf4").bfloat16(), torch.Generator().manual_seed(0)
    wanted: dict[str, torch.Tensor] = {}
    for module_name, dense in find_linears(model).candidates.items():
        rows, columns = dense.shape
        codes = torch.randint(16, (rows, columns // 64, 64), generator=generator)
        codes[..., 0] = 15  # each block reaches its scale
        scales = 2.0 ** torch.randint(-6, -1, (rows, columns // 64, 1), generator=generator)
        exact = (levels[codes] * scales.bfloat16()).view(rows, columns).to(dtype_of(name))
        wanted[module_name] = exact
        model.get_submodule(module_name).weight.data = exact.T.contiguous() if dense.transposed else exact
    source = save_model(model, tmp_path / "source")
    report = loftq.quantize(str(source), output=tmp_path / "out", rank=4, iters=0, quiet=True)
    loaded = auto_class(TASKS[task]).from_pretrained(report.folder, dtype=dtype_of(name))
    assert {row["name"] for row in report.layers} == set(wanted)
    for module_name, exact in wanted.items():
        found = read_linear(loaded.get_submodule(module_name))
        torch.testing.assert_close(found.float(), exact.float(), rtol=2**-8, atol=0)


def test_fused_experts_are_counted(tmp_path: Path, run: Any) -> None:
    """Oracle: the parameters of the model that stock transformers builds."""
    source = save_pico("qwen2_moe", "causal-lm", tmp_path / "source")
    options: dict[str, Any] = {"rank": 4, "iters": 1, "format": "bitsandbytes"}
    report = loftq.quantize(str(source), output=tmp_path / "out", **options, quiet=True)
    model = auto_class(TASKS["causal-lm"]).from_pretrained(source, dtype=torch.bfloat16)
    experts = sum(p.numel() * 2 for name, p in model.named_parameters() if ".experts." in name)
    assert report.totals["expert_bytes"] == experts > 0
    said = (
        f"fused experts stay in bfloat16: {experts / 1e9:.3g} GB, because --format bitsandbytes has no place for them"
    )
    assert said in report.notes
    assert said in (report.folder / "README.md").read_text()
    assert said in run("quantize", source, "--rank", "4", "--format", "bitsandbytes", "--dry-run").stdout
    shared = [row["name"] for row in report.layers if "shared_expert" in row["name"]]
    assert len(shared) == 6
    assert not any(row["name"].endswith("gate") for row in report.layers)


def test_generic_way_is_said(tmp_path: Path) -> None:
    for kind, said in (("diffllama", True), ("granite", False)):  # granite has no row of its own, but is covered
        source = save_small(kind, "causal-lm", tmp_path / kind)
        report = loftq.quantize(str(source), output=tmp_path / "out", rank=4, dry_run=True)
        assert any("not in the table of families" in note for note in report.notes) == said
