"""What a model type can do, seen on a small model of it: the rows of `loftq/models/data/coverage.json`.

python tests/type_coverage.py            examines every type and writes the file
python tests/type_coverage.py llama t5   examines these types again, and keeps the other rows
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from small_configs import default_config
from small_models import architecture_of, dtype_of, output_of, save_small
from transformers import CONFIG_MAPPING
from vision_models import PICOS, save_vision, vision_inputs

import loftq
from loftq.errors import LoftQError
from loftq.formats.artifact import open_artifact
from loftq.formats.disk import write_whole
from loftq.formats.layouts import LAYOUTS
from loftq.models import coverage
from loftq.models.loading import guard_cpu
from loftq.models.tasks import IMAGE_TEXT, TASKS, auto_class
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.verbs.zoo import config_source

OPTIONS: dict[str, Any] = {"rank": 8, "iters": 2, "alpha": 16, "quiet": True}
TEXT: dict[str, Any] = {"calibration": "default", "calibration_tokens": 4096, "sequence_length": 64, "refine": 0}
_CAUSAL, _CLASSES = "causal-lm", "sequence-classification"
_ENCODER = ("masked-lm", _CLASSES, "token-classification", "question-answering", "feature-extraction")
_GROUPS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "decoder",
        (_CAUSAL, _CLASSES),
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gpt2 gpt_neox bloom opt phi phi3",
    ),
    (
        "decoder",
        (_CAUSAL,),
        """smollm3 olmo olmo2 olmo3 falcon gptj granite stablelm codegen cohere cohere2 starcoder2 glm glm4 exaone4
        ernie4_5 helium persimmon nemotron seed_oss arcee gpt_bigcode xglm biogpt mpt modernbert-decoder ministral3
        gpt_neo openai-gpt apertus""",
    ),
    (
        "mixture",
        (_CAUSAL,),
        """mixtral qwen2_moe qwen3_moe olmoe gpt_oss deepseek_v3 glm4_moe granitemoe phimoe minimax_m2 ernie4_5_moe
        hunyuan_v1_moe llama4_text qwen3_next solar_open deepseek_v2 afmoe""",
    ),
    (
        "state space",
        (_CAUSAL,),
        "mamba mamba2 falcon_mamba jamba bamba zamba2 nemotron_h falcon_h1 recurrent_gemma lfm2 granitemoehybrid rwkv",
    ),
    (
        "encoder",
        _ENCODER,
        "bert roberta xlm-roberta electra deberta deberta-v2 distilbert albert camembert mpnet modernbert",
    ),
    (
        "encoder",
        ("masked-lm",),
        """eurobert convbert big_bird rembert roformer megatron-bert ernie nystromformer layoutlm esm xlm-roberta-xl
        data2vec-text mobilebert xlm squeezebert""",
    ),
    ("encoder-decoder", ("seq2seq-lm", _CLASSES), "bart t5 mbart"),
    (
        "encoder-decoder",
        ("seq2seq-lm",),
        "pegasus marian mt5 umt5 longt5 led blenderbot m2m_100 prophetnet t5gemma plbart bigbird_pegasus",
    ),
    ("vision", ("image-classification", "feature-extraction"), "vit deit beit swin"),
    ("vision", ("image-classification",), "dinov2 dinov3_vit clip siglip segformer pvt vit_msn ijepa convnext"),
    ("image-text", (IMAGE_TEXT,), " ".join(PICOS)),
    ("speech", ("speech-seq2seq",), "whisper speech_to_text"),
    (
        "speech",
        ("ctc",),
        "wav2vec2 hubert wavlm unispeech unispeech-sat sew data2vec-audio wav2vec2-bert wav2vec2-conformer",
    ),
)


def cases() -> Iterator[tuple[str, str, str]]:
    """Group, type and task of every row."""
    for group, tasks, kinds in _GROUPS:
        for kind in dict.fromkeys(kinds.split()):
            yield from ((group, kind, task) for task in tasks if type_has(kind, task))


def type_has(kind: str, task: str) -> bool:
    """Whether transformers has a class of a type for a task."""
    return CONFIG_MAPPING[kind] in auto_class(TASKS[task])._model_mapping


def examine(group: str, kind: str, task: str, folder: Path) -> dict[str, Any]:
    """The row of a type and a task. `refused` is the line of an error in place of the rest."""
    row: dict[str, Any] = {"type": kind, "group": group, "task": task}
    save = partial(save_vision, kind) if task == IMAGE_TEXT else partial(save_small, kind, task)
    source = save(folder / "source")
    try:
        report = loftq.quantize(str(source), output=folder / "out", **OPTIONS)
    except LoftQError as error:
        return row | {"refused": str(error).splitlines()[0].replace(str(source), "the model")}
    full = auto_class(TASKS[task]).from_pretrained(source, dtype=dtype_of(kind)).eval()
    base = auto_class(TASKS[task]).from_pretrained(report.folder, dtype=dtype_of(kind))
    guard_cpu(base)
    with warnings.catch_warnings():  # about patterns of ranks that name parameters, which peft honours all the same
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        model = PeftModel.from_pretrained(base, report.folder, subfolder="loftq_init", is_trainable=True).eval()
    row["loads"] = "stock" if LAYOUTS[open_artifact(report.folder).manifest["format"]].STOCK else "loftq"
    names = model.peft_config["default"].target_modules
    row["targets"] = sorted({re.sub(r".*\.(?=\D)", "", name) for name in names})  # `up_proj`, `fc.0`
    row["nearer"] = _nearer(kind, task, full, base, model)
    row["trains"] = _trains(kind, task, base, model)
    row["calibrates"] = _calibrates(source, folder)
    row["kept"] = kept_share(kind, task, folder / "default")
    return row


def _output(kind: str, task: str, model: Any, base: Any) -> torch.Tensor:
    """What a model answers to texts, images, sounds, or texts with an image each."""
    return model(**vision_inputs(kind)).logits.float() if task == IMAGE_TEXT else output_of(model, base)


def _nearer(kind: str, task: str, full: Any, base: Any, model: Any) -> float:
    """The distance of the outputs to those of the full model, relative to the distance without the adapter."""
    with torch.no_grad():
        wanted, adapted = _output(kind, task, full, full), _output(kind, task, model, base)
        with model.disable_adapter():
            for wrapper in base.modules():  # the head is the adapter's: off, it would be one begun anew
                if hasattr(wrapper, "modules_to_save"):
                    wrapper.original_module.load_state_dict(wrapper.modules_to_save["default"].state_dict())
            alone = _output(kind, task, model, base)
    return round(float((adapted - wanted).norm() / (alone - wanted).norm()), 3)


def _trains(kind: str, task: str, base: Any, model: Any) -> list[int]:
    """The number of factors that get a gradient, and the number of factors."""
    model.train()
    _output(kind, task, model, base).square().mean().backward()
    factors = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    return [sum(factor.grad is not None and bool(factor.grad.any()) for factor in factors), len(factors)]


def _calibrates(source: Path, folder: Path) -> str:
    """What calibrates the type: text, text that reaches only some of the linears, or nothing."""
    try:
        report = loftq.quantize(str(source), output=folder / "calibrated", **TEXT, **OPTIONS)
    except LoftQError:
        return "no"
    return "partly" if any("never reached" in note for note in report.notes) else "text"


def kept_share(kind: str, task: str, folder: Path) -> float | None:
    """The share of the weights that stays in 16 bits, in a model of the size that the type has by default.

    None if transformers cannot build a model of that size, or if it does not fit the default settings.
    """
    config = default_config(kind)
    config.architectures, config.dtype = [architecture_of(config, task)], torch.bfloat16
    config.save_pretrained(folder)
    try:
        plan = make_plan(config_source(kind, folder), recipe_of(task=task))
    except LoftQError:
        return None
    total = sum(spec.numel for spec in plan.source.checkpoint.tensors.values())
    return round(1 - plan.weights / total, 3)


def main(names: list[str]) -> None:
    """Examine types, and write the rows."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = Path(coverage.__file__).parent / "data" / "coverage.json"
    known = {(row["type"], row["task"]): row for row in coverage.rows()} if path.is_file() else {}
    for group, kind, task in cases():
        if (kind, task) in known and names and kind not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            known[kind, task] = examine(group, kind, task, Path(folder))
        print(json.dumps(known[kind, task]), file=sys.stderr)
        rows = (known[kind, task] for _, kind, task in cases() if (kind, task) in known)
        write_whole(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")  # so that an interrupted run counts


if __name__ == "__main__":
    main(sys.argv[1:])
