"""LoftQ initialization for quantized LoRA fine-tuning.

>>> import loftq
>>> report = loftq.quantize("meta-llama/Llama-2-7b-hf", bits=4, rank=16, iters=5)
>>> model = loftq.load_qlora(report.folder)
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":  # it has neither locks of folders nor reads at an offset
    raise ImportError("loftq runs on Linux and macOS: on Windows, install it in WSL (`wsl --install`)")

from loftq.chatter import silent_loggers
from loftq.models import register

if TYPE_CHECKING:
    from loftq.errors import LoftQError as LoftQError
    from loftq.models.loading import load_qalora as load_qalora
    from loftq.models.loading import load_qlora as load_qlora
    from loftq.training.evaluate import evaluate as evaluate
    from loftq.training.generate import generate as generate
    from loftq.training.keep_float32 import KeepFloat32 as KeepFloat32
    from loftq.training.sweep import sweep as sweep
    from loftq.training.train import train as train
    from loftq.verbs.config import config as config
    from loftq.verbs.convert import convert as convert
    from loftq.verbs.inspect import inspect as inspect
    from loftq.verbs.merge import merge as merge
    from loftq.verbs.push import push as push
    from loftq.verbs.quantize import quantize as quantize
    from loftq.verbs.quantize_model import quantize_model as quantize_model
    from loftq.verbs.relocate import relocate as relocate
    from loftq.verbs.report import report as report
    from loftq.verbs.verify import verify as verify

__all__ = [
    "KeepFloat32",
    "LoftQError",
    "config",
    "convert",
    "evaluate",
    "generate",
    "inspect",
    "load_qalora",
    "load_qlora",
    "merge",
    "push",
    "quantize",
    "quantize_model",
    "relocate",
    "report",
    "sweep",
    "train",
    "verify",
]

_HOMES = {
    "KeepFloat32": "loftq.training.keep_float32",
    "LoftQError": "loftq.errors",
    "config": "loftq.verbs.config",
    "convert": "loftq.verbs.convert",
    "evaluate": "loftq.training.evaluate",
    "generate": "loftq.training.generate",
    "inspect": "loftq.verbs.inspect",
    "load_qalora": "loftq.models.loading",
    "load_qlora": "loftq.models.loading",
    "merge": "loftq.verbs.merge",
    "push": "loftq.verbs.push",
    "quantize": "loftq.verbs.quantize",
    "quantize_model": "loftq.verbs.quantize_model",
    "relocate": "loftq.verbs.relocate",
    "report": "loftq.verbs.report",
    "sweep": "loftq.training.sweep",
    "train": "loftq.training.train",
    "verify": "loftq.verbs.verify",
}


logging.getLogger(__name__).addHandler(logging.NullHandler())  # nothing is printed unless a program asks for it
register.install()  # folders of ours that stock transformers cannot load, it can from here on


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: peft and transformers take seconds."""
    if name == "__version__":
        from importlib.metadata import version  # itself takes a tenth of a second

        return version("loftq")
    if name not in _HOMES:
        raise AttributeError(f"module 'loftq' has no attribute {name!r}")
    with silent_loggers("bitsandbytes"):  # it names kernels that are optional when it is imported
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
