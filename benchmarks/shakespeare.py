"""Fine-tuning on Shakespeare from each start: loss curves in one picture, the last losses, a sample of each.

    python benchmarks/shakespeare.py [MODEL] [--data FILE] [--methods qlora loftq] [--bits 4] [--rank 16] [--steps 60]
                                     [--rate 5e-4] [--seed 0] [--work DIR] [--png benchmarks/figures/shakespeare.png]

`loftq train --task clm` with blocks of 256 tokens, two a step, the same ones in the same order from every start; a
twentieth of the blocks is held out. A calibrated start takes the text that is shipped. `pip install loftq[report]`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from machine import describe, table
from transformers.utils import logging

import loftq

HERE = Path(__file__).parent
PROMPT = "KING HENRY:\nO, what a"
TITLES = {"qlora": "QLoRA", "loftq": "LoftQ", "calibrated": "calibrated"}


def curve(folder: Path, options: argparse.Namespace, work: Path) -> tuple[dict[str, Any], str]:
    """Steps and losses, and what the trained model writes."""
    output = work / f"{folder.name}-trained"
    loftq.train(
        folder,
        task="clm",
        data=options.data,
        output=output,
        cutoff_len=256,
        max_steps=options.steps,
        batch_size=2,
        learning_rate=options.rate,
        eval_steps=max(options.steps // 6, 1),
        seed=options.seed,
        overwrite=(output / "training.json").is_file(),
        quiet=True,
        set={"eval_on_start": True, "logging_steps": 1, "save_strategy": "no"},
    )
    history = json.loads((output / "training.json").read_text(encoding="utf-8"))["history"]
    found = {
        kind: [(entry["step"], entry[kind]) for entry in history if kind in entry] for kind in ("loss", "eval_loss")
    }
    said = loftq.generate(str(folder), PROMPT, adapter=str(output), chat_template=False, max_new_tokens=48)
    return found, said


def draw(curves: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """The training loss, pale, and the held-out one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for color, (name, found) in zip(("#2979d8", "#e8590c", "#1b9e6b"), curves.items(), strict=False):
        axes.plot(*zip(*found["loss"], strict=True), color=color, alpha=0.25, linewidth=1)
        axes.plot(*zip(*found["eval_loss"], strict=True), color=color, marker="o", label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def main() -> None:
    """Quantize, train, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "shakespeare.txt")
    parser.add_argument("--methods", nargs="+", default=["qlora", "loftq"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--png", type=Path, default=HERE / "figures" / "shakespeare.png")
    options = parser.parse_args()
    logging.set_verbosity_error()
    curves: dict[str, dict[str, Any]] = {}
    samples = []
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        for method in options.methods:
            folder = work / f"{method}-{options.bits}-{options.rank}"
            if not (folder / "loftq.json").is_file():
                known = {"calibration": "default", "sequence_length": 512} if method == "calibrated" else {}
                settings = {"bits": options.bits, "rank": options.rank, "method": method}
                loftq.quantize(options.model, output=folder, quiet=True, **settings, **known)
            curves[TITLES[method]], said = curve(folder, options, work)
            samples.append((TITLES[method], said))
    title = f"{options.model or 'SmolLM2-135M-Instruct'} on Shakespeare, NF{options.bits}, rank {options.rank}"
    draw(curves, options.png, title)
    rows: list[tuple[str, ...]] = [("start", "held out, before", "after", "train, last 5 steps")]
    for name, found in curves.items():
        last = [loss for _, loss in found["loss"][-5:]]
        held = found["eval_loss"]
        rows.append((name, f"{held[0][1]:.4f}", f"{held[-1][1]:.4f}", f"{sum(last) / len(last):.4f}"))
    print(f"\n{options.steps} steps of 512 tokens at {options.rate:g}, seed {options.seed}; {describe()}\n")
    print(table(rows))
    for name, said in samples:
        print(f"\n{name}:\n{PROMPT}{said}")


if __name__ == "__main__":
    main()
