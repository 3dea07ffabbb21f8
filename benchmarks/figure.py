"""The picture of docs/checking.md: starts of the default model side by side, as `loftq report` draws them.

    python benchmarks/figure.py --data FILE [MODEL] [--work DIR] [--png benchmarks/figures/starts.png] [--html PAGE]

NF4 at rank 16 (QLoRA's start, LoftQ, calibrated) and NF2 at rank 64 (LoftQ, calibrated). Errors of outputs are measured
on 65,536 tokens of FILE's first half, in windows of 512, on which the calibrated starts are calibrated. The artifacts
are kept in DIR, where a later call finds them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import loftq

FIGURE = Path(__file__).parent / "figures" / "starts.png"
STARTS: dict[str, dict[str, Any]] = {
    "nf4-qlora": {"method": "qlora"},
    "nf4-loftq": {"method": "loftq"},
    "nf4-calibrated": {"method": "calibrated"},
    "nf2-loftq": {"method": "loftq", "bits": 2, "rank": 64},
    "nf2-calibrated": {"method": "calibrated", "bits": 2, "rank": 64},
}


def main() -> None:
    """Make what is not there yet, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("model_zoo/loftq/starts"))
    parser.add_argument("--png", type=Path, default=FIGURE)
    parser.add_argument("--html", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    text = options.data.read_text(encoding="utf-8")
    calibration = options.work / "calibration.txt"
    calibration.write_text(text[: len(text) // 2], encoding="utf-8")
    known = {"calibration": calibration, "calibration_tokens": 65536, "sequence_length": 512, "resume": True}
    folders = [
        loftq.quantize(options.model, output=options.work / name, **known, **start).folder
        for name, start in STARTS.items()
    ]
    for path in loftq.report(folders, html=options.html, png=options.png, overwrite=True):
        print(path)


if __name__ == "__main__":
    main()
