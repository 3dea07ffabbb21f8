"""What mlx and mlx-lm make of our files, by the Python that LOFTQ_MLX_PYTHON names, or else by this one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

READER = Path(__file__).parent / "formats" / "mlx_reader.py"


def run_mlx(*arguments: object) -> dict[str, np.ndarray]:
    """What mlx_reader.py says of a file; its third argument is where it says so. Skips the test without mlx."""
    python = os.environ.get("LOFTQ_MLX_PYTHON") or (importlib.util.find_spec("mlx_lm") and sys.executable)
    if not python:
        pytest.skip("no mlx here: LOFTQ_MLX_PYTHON names no Python that has it")
    subprocess.run([python, str(READER), *map(str, arguments)], check=True, timeout=300)
    return dict(np.load(str(arguments[2])))
