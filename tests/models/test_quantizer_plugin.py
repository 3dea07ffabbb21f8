"""The plug-in: folders that stock transformers cannot load, with and without `import loftq`.

Covers: loftq/formats/native.py, loftq/models/native_quantizer.py, loftq/models/packed_quantizer.py,
loftq/models/register.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from oracles import read_linear
from picos import output_of, save_pico
from processes import run_python
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loftq
from loftq.models.packed_linear import PackedLinear

LOAD = """
import sys
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16{options})
model = PeftModel.from_pretrained(model, sys.argv[1], subfolder="loftq_init", is_trainable=True)
print(sum(type(module).__name__ == "PackedLinear" for module in model.modules()))
"""
STOCK = "import torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM"


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("falcon")
    source = save_pico("falcon/new", "causal-lm", folder / "source", num_hidden_layers=2)
    return loftq.quantize(str(source), output=folder / "out", rank=4, iters=1, quiet=True).folder


def test_without_the_import_the_folder_is_refused(falcon: Path) -> None:
    """Oracle: a process of stock transformers, which must not fill the model with random weights."""
    ended = run_python(LOAD.format(imports=STOCK, options=""), falcon)
    assert ended.returncode == 1
    assert "MISMATCH" in ended.stderr or "size mismatch" in ended.stderr
    assert not ended.stdout


@pytest.mark.parametrize(
    ("imports", "options", "level"),
    [
        (f"import loftq\n{STOCK}", "", "torch"),  # before transformers is imported
        (f"{STOCK}\nimport transformers.quantizers\nimport loftq", ', device_map={"": "cpu"}', "stock"),
        (f"{STOCK}\nimport loftq", ', device_map="auto"', "stock"),
    ],
)
def test_with_the_import_it_loads(imports: str, options: str, level: str, falcon: Path) -> None:
    ended = run_python(LOAD.format(imports=imports, options=options), falcon, level=level)
    assert ended.stdout.split() == ["8"], ended.stderr


def test_the_import_is_light() -> None:
    """Nothing that takes seconds is imported before it is used."""
    code = (
        "import sys, loftq; print([m for m in ('torch', 'transformers', 'peft', 'bitsandbytes') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"


def test_save_pretrained_writes_the_same_tensors_back(falcon: Path, tmp_path: Path) -> None:
    """Oracle: the folder's own tensors and config, and the outputs of the model that was saved."""
    model = AutoModelForCausalLM.from_pretrained(falcon, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (falcon, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (falcon, tmp_path / "again")]
    assert configs[0] == configs[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(output_of(model.eval()), output_of(loaded.eval()))


def test_dequantize_gives_dense_linears(falcon: Path) -> None:
    """Oracle: the weights as numpy reads them."""
    packed = AutoModelForCausalLM.from_pretrained(falcon, dtype=torch.bfloat16)
    wanted = {n: read_linear(m) for n, m in packed.named_modules() if isinstance(m, PackedLinear)}
    dense = packed.dequantize()
    assert wanted
    assert all(torch.equal(dense.get_submodule(n).weight, weight.bfloat16()) for n, weight in wanted.items())


def test_packed_tensors_of_a_wrong_size_are_refused(falcon: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(falcon, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(key for key in tensors if key.endswith("query_key_value.weight"))
    tensors[name] = tensors[name][:-8].clone()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(loftq.LoftQError, match=rf"model.safetensors: {name} is torch.uint8 .*expected torch.uint8"):
        AutoModelForCausalLM.from_pretrained(broken)
    with pytest.raises(loftq.LoftQError, match=r"model\.safetensors"):
        loftq.load_qlora(broken)


@pytest.fixture(scope="module")
def gptq(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gptq") / "out"
    return loftq.quantize(str(pico), output=out, bits=3, quant_type="int", rank=4, iters=1, quiet=True).folder


def test_a_gptq_folder_needs_gptqmodel_or_the_import(gptq: Path) -> None:
    """Oracle: processes of stock transformers without gptqmodel, which must not fill the model with random weights."""
    ended = run_python(LOAD.format(imports=STOCK, options=""), gptq)
    assert ended.returncode == 1
    assert "optimum" in ended.stderr
    ended = run_python(
        LOAD.format(imports=f"import loftq\n{STOCK}", options=', device_map="auto"'), gptq, level="torch"
    )
    assert ended.returncode == 0, ended.stderr


def test_gptq_formats_that_we_do_not_read_are_left_to_gptqmodel(gptq: Path, tmp_path: Path) -> None:
    import shutil

    other = shutil.copytree(gptq, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match="'marlin' can only be read by gptqmodel: pip install gptqmodel"):
        AutoModelForCausalLM.from_pretrained(other)


def test_each_load_chooses_for_itself_who_reads_gptq(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: transformers' own quantizer in the table, as where gptqmodel is installed, asked amid our own load."""
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_gptq import GptqHfQuantizer
    from transformers.utils.quantization_config import GPTQConfig

    from loftq.models.gptq_quantizer import GptqQuantizer

    options = {"adapter": "qalora", "bits": 3, "group_size": 32, "format": "gptq", "rank": 2}
    folder = loftq.quantize(str(pico), output=tmp_path / "out", iters=1, quiet=True, **options).folder
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "gptq", GPTQConfig)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "gptq", GptqHfQuantizer)
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    grids, refusals = GptqQuantizer._grids, []

    def load_another(*arguments: object) -> object:
        assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
        with ThreadPoolExecutor(1) as pool, pytest.raises(ImportError, match="optimum") as refused:
            pool.submit(AutoModelForCausalLM.from_pretrained, folder).result()
        refusals.append(refused)
        return grids(*arguments)

    monkeypatch.setattr(GptqQuantizer, "_grids", load_another)
    model = loftq.load_qalora(folder)
    assert refusals
    assert any(type(module).__name__ == "GptqLinear" for module in model.modules())
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    model.get_base_model().save_pretrained(tmp_path / "again")
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path / "again")]
    assert [config["quant_method"] for config in configs] == ["gptq", "gptq"]


@pytest.mark.parametrize("key", ["qweight", "qzeros", "scales"])
def test_gptq_tensors_of_a_wrong_size_are_refused(key: str, gptq: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(gptq, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith(f"up_proj.{key}"))
    tensors[name] = tensors[name][:, :-1].clone()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(loftq.LoftQError, match=rf"model.safetensors: {name} is torch"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_the_card_of_each_format(gptq: Path, pico: Path, tmp_path: Path) -> None:
    card = (gptq / "README.md").read_text()
    assert "- gptq" in card
    assert "not needed if gptqmodel" in card
    assert "14 x" not in card
    assert "int3, groups of 64, integer zero-points" in card
    eight = loftq.quantize(str(pico), output=tmp_path / "out", bits=8, rank=4, iters=1, quiet=True).folder
    card = (eight / "README.md").read_text()
    assert "BitsAndBytesConfig(load_in_8bit=True)" in card
    assert "int8, one scale per row, symmetric zero-points" in card


def test_the_plan_and_the_card_say_how_it_loads(falcon: Path) -> None:
    card = (falcon / "README.md").read_text()
    assert "import loftq" in card
    assert "BitsAndBytesConfig" not in card
    assert "stock transformers cannot load FalconLinear quantized" in card
    config = json.loads((falcon / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "loftq"


def test_a_format_of_a_later_loftq_is_refused(falcon: Path, tmp_path: Path) -> None:
    import shutil

    later = shutil.copytree(falcon, tmp_path / "later")
    config = json.loads((later / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (later / "config.json").write_text(json.dumps(config))
    with pytest.raises(loftq.LoftQError, match=r"format version 99.*upgrade loftq"):
        AutoModelForCausalLM.from_pretrained(later)


def test_excluded_linears_stay_as_they_are(tmp_path: Path) -> None:
    source = save_pico("falcon", "causal-lm", tmp_path / "source")
    report = loftq.quantize(
        str(source), output=tmp_path / "out", rank=4, iters=1, exclude_modules=["dense_h_to_4h"], quiet=True
    )
    model = loftq.load_qlora(report.folder)
    kinds = {name.split(".")[-1]: type(m) for name, m in model.named_modules() if "mlp.dense" in name}
    assert kinds["dense_h_to_4h"].__name__ == "FalconLinear"
    assert any(isinstance(module, PackedLinear) for module in model.modules())
