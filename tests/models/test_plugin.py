"""The plug-in: folders that stock transformers cannot load, with and without `import loftq`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bitsandbytes.nn import Linear4bit
from picos import save_pico
from transformers import AutoModelForCausalLM

import loftq

LOAD = """
import sys
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16{options})
model = PeftModel.from_pretrained(model, sys.argv[1], subfolder="loftq_init", is_trainable=True)
print(sum(type(module).__module__.startswith("bitsandbytes") for module in model.modules()))
"""
STOCK = "import torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM"


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("falcon")
    source = save_pico("falcon/new", "causal-lm", folder / "source", num_hidden_layers=2)
    return loftq.quantize(str(source), output=folder / "out", rank=4, iters=1, quiet=True).folder


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_without_the_import_the_folder_is_refused(falcon: Path) -> None:
    """Oracle: a process of stock transformers, which must not fill the model with random weights."""
    ended = run_python(LOAD.format(imports=STOCK, options=""), falcon)
    assert ended.returncode == 1
    assert "MISMATCH" in ended.stderr or "size mismatch" in ended.stderr
    assert not ended.stdout


@pytest.mark.parametrize(
    ("imports", "options"),
    [
        (f"import loftq\n{STOCK}", ""),
        (f"{STOCK}\nimport transformers.quantizers\nimport loftq", ', device_map={"": "cpu"}'),
        (f"{STOCK}\nimport loftq", ', device_map="auto"'),
    ],
)
def test_with_the_import_it_loads(imports: str, options: str, falcon: Path) -> None:
    ended = run_python(LOAD.format(imports=imports, options=options), falcon)
    assert ended.stdout.split() == ["8"], ended.stderr


def test_the_import_is_light() -> None:
    """Nothing that takes seconds is imported before it is used."""
    code = (
        "import sys, loftq; print([m for m in ('torch', 'transformers', 'peft', 'bitsandbytes') if m in sys.modules])"
    )
    assert run_python(code).stdout.strip() == "[]"


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
    config["quantization_config"]["format"] = "of-tomorrow"
    (later / "config.json").write_text(json.dumps(config))
    with pytest.raises(loftq.LoftQError, match=r"'of-tomorrow'.*upgrade loftq"):
        AutoModelForCausalLM.from_pretrained(later)


def test_excluded_linears_stay_as_they_are(tmp_path: Path) -> None:
    source = save_pico("falcon", "causal-lm", tmp_path / "source")
    report = loftq.quantize(
        str(source), output=tmp_path / "out", rank=4, iters=1, exclude_modules=["dense_h_to_4h"], quiet=True
    )
    model = loftq.load_qlora(report.folder)
    kinds = {name.split(".")[-1]: type(m) for name, m in model.named_modules() if "mlp.dense" in name}
    assert kinds["dense_h_to_4h"].__name__ == "FalconLinear"
    assert any(isinstance(module, Linear4bit) for module in model.modules())
