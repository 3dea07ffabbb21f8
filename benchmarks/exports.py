"""A trained adapter written by every target of `loftq merge`: perplexity by each reader, size, time and peak memory.

    python benchmarks/exports.py FOLDER TRAINED CALIBRATION HELD_OUT [--only NAME ...] [--windows 12]

FOLDER is a folder of NF4, TRAINED an adapter that was trained on it, CALIBRATION and HELD_OUT are texts. Each export
runs in a process of its own. Perplexity is that of transformers in float32, on windows of 512 tokens of HELD_OUT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from machine import describe, table
from perplexity import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig
from transformers.utils import logging

from loftq.display import size

LENGTH = 512
_TEXT = {"calibration_tokens": 32768, "sequence_length": LENGTH}
EXPORTS: dict[str, dict[str, Any]] = {
    "bf16": {"to": "bf16"},
    "compressed-tensors": {"to": "compressed-tensors", "group_size": 64},
    "compressed-tensors, calibrated": {"to": "compressed-tensors", "group_size": 64, **_TEXT},
    "compressed-tensors, zero-points": {"to": "compressed-tensors", "group_size": 64, "zero_point": "integer"},
    "compressed-tensors, zero-points, calibrated": {
        "to": "compressed-tensors",
        "group_size": 64,
        "zero_point": "integer",
        **_TEXT,
    },
    "GGUF Q8_0": {"to": "gguf", "gguf_type": "Q8_0"},
    "GGUF Q6_K": {"to": "gguf", "gguf_type": "Q6_K"},
    "GGUF Q4_K_M": {"to": "gguf", "gguf_type": "Q4_K_M"},
}
_CHILD = """
import json, sys
from pathlib import Path
import loftq
folder, trained, output, settings = sys.argv[1:]
report = loftq.merge(folder, trained, output=output, quiet=True, **json.loads(settings))
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"bytes": report.bytes, "seconds": report.seconds, "peak": peak}))
"""


def load(folder: Path) -> Any:
    """The model by transformers, with dense weights."""
    file = next(folder.glob("*.gguf"), None)
    options: dict[str, Any] = {"gguf_file": file.name} if file else {}
    if file is None and "quantization_config" in json.loads((folder / "config.json").read_text()):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def main() -> None:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("folder", "trained", "calibration", "held_out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", nargs="*", default=list(EXPORTS), choices=list(EXPORTS), metavar="NAME")
    parser.add_argument("--windows", type=int, default=12)
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print(describe("cpu"), flush=True)
    tokens = AutoTokenizer.from_pretrained(options.folder)(options.held_out.read_text(), return_tensors="pt").input_ids
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only:
            settings, output = dict(EXPORTS[name]), Path(scratch) / name
            if "calibration_tokens" in settings:
                settings |= {"calibration": str(options.calibration), "statistics": f"{scratch}/statistics"}
            arguments = [options.folder, options.trained, output, json.dumps(settings)]
            command = [sys.executable, "-c", _CHILD, *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                rows.append((name, done.stderr.splitlines()[-1][:80], "", "", ""))
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            measured = perplexity(load(output), tokens, options.windows, LENGTH)
            figures = [f"{measured:.2f}", size(found["bytes"]), f"{found['seconds']:.0f} s", size(found["peak"])]
            rows.append((name, *figures))
            print(*rows[-1], flush=True)
    print(table([("", "perplexity", "weights", "time", "peak memory"), *rows]))


if __name__ == "__main__":
    main()
