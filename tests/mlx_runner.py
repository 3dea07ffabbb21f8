"""What mlx and mlx-lm make of our files, by the Python that LOFTQ_MLX_PYTHON names, or else by this one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from processes import run_python

READER = Path(__file__).parent / "formats" / "mlx_reader.py"


def run_mlx(*arguments: object) -> dict[str, np.ndarray]:
    """What mlx_reader.py says of a file; its third argument is where it says so. Skips the test without mlx."""
    if python := os.environ.get("LOFTQ_MLX_PYTHON"):
        subprocess.run([python, str(READER), *map(str, arguments)], check=True, timeout=300)
    elif importlib.util.find_spec("mlx_lm"):
        ended = run_python(READER.read_text(encoding="utf-8"), *arguments)
        assert ended.returncode == 0, ended.stderr
    else:
        pytest.skip("no mlx here: LOFTQ_MLX_PYTHON names no Python that has it")
    return dict(np.load(str(arguments[2])))
